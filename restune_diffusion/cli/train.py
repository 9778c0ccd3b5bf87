"""`restune train`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .quiet import quiet_libraries

if TYPE_CHECKING:
    from ..training import TrainConfig


def run_train(config: TrainConfig) -> None:
    """Train a tuner and say where it is."""
    quiet_libraries()  # before the imports below, which warn
    from ..training import train

    result = train(config, stop_on_signal=True)
    print(f"Trained {result.steps} steps in {result.seconds:.0f} s: {result.path}")
    if result.samples:
        print(f"Samples: {result.samples[-1]}")
