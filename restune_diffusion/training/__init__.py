"""Train tuners: `train(TrainConfig(base=..., data=..., output=...))`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config.config_file import read_config
from .config.train_config import TrainConfig
from .config.validation import ValidationConfig

if TYPE_CHECKING:
    from .state import StepReport
    from .sweeps.report import SweepResult, SweepRow
    from .sweeps.run import sweep
    from .trainer import TrainResult, train

__all__ = [
    "StepReport",
    "SweepResult",
    "SweepRow",
    "TrainConfig",
    "TrainResult",
    "ValidationConfig",
    "read_config",
    "sweep",
    "train",
]

_HOME = {
    "StepReport": "state",
    "SweepResult": "sweeps.report",
    "SweepRow": "sweeps.report",
    "TrainResult": "trainer",
    "sweep": "sweeps.run",
    "train": "trainer",
}


def __getattr__(name: str) -> Any:
    # Only the config is imported eagerly, so that a command line can show its help without importing torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
