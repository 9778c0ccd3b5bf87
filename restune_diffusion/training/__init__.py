"""Train tuners: `train(TrainConfig(base=..., data=..., output=...))`."""

from typing import TYPE_CHECKING

from ..utils.lazy_names import lazy_names
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

_MODULES = {
    "state": ("StepReport",),
    "sweeps.report": ("SweepResult", "SweepRow"),
    "sweeps.run": ("sweep",),
    "trainer": ("TrainResult", "train"),
}

# Only the config is imported eagerly, so that a command line can show its help without importing torch.
__getattr__ = lazy_names(__name__, _MODULES)
