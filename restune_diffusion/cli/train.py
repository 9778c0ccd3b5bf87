"""`restune train`."""

from __future__ import annotations

from ..training import TrainConfig, train
from .quiet import quiet_libraries


def run_train(config: TrainConfig) -> None:
    """Train a tuner and say where it is."""
    quiet_libraries()
    result = train(config)
    print(f"Trained {result.steps} steps in {result.seconds:.0f} s: {result.path}")
    if result.samples:
        print(f"Samples: {result.samples[-1]}")
