"""`restune train`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .quiet import quiet_libraries

if TYPE_CHECKING:
    from ..training import TrainConfig


def run_train(config: TrainConfig) -> None:
    """Train a tuner, or those of a sweep, and say where they are."""
    quiet_libraries()  # before the imports below, which warn
    from ..training import sweep, train

    if config.sweep is not None:
        swept = sweep(config, stop_on_signal=True)
        print(f"Trained {len(swept.rows)} tuners in {swept.seconds:.0f} s: {swept.summary}")
        print(swept.table())
        if swept.sheet is not None:
            print(f"Samples: {swept.sheet}")
        return
    result = train(config, stop_on_signal=True)
    print(f"Trained {result.steps} steps in {result.seconds:.0f} s: {result.path}")
    if result.samples:
        print(f"Samples: {result.samples[-1]}")
