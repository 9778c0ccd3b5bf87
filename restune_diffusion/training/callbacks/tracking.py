"""Where a run is logged beside `metrics.jsonl`: accelerate's trackers."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available, is_wandb_available

from ...utils.errors import TrainingError
from ..config.train_config import TrainConfig

_AVAILABLE = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
_TITLES = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases"}


def tracker_name(log_with: str) -> str | None:
    """Return which of accelerate's trackers is asked for, if any; TensorBoard where it is installed for `auto`.

    Raises:
        TrainingError: if it is asked for and not installed; accelerate would only leave the log out.
    """
    if log_with == "auto":
        return "tensorboard" if is_tensorboard_available() else None
    if log_with == "none":
        return None
    if not _AVAILABLE[log_with]():
        raise TrainingError(
            f"{_TITLES[log_with]} is not installed; run pip install 'restune-diffusion[{log_with}]', "
            f"or leave --log-with out."
        )
    return log_with


def start_trackers(accelerator: Accelerator, config: TrainConfig) -> None:
    """Begin the log: TensorBoard's in OUTPUT/logs, or a run named as the tuner in the wandb project."""
    if tracker_name(config.log_with) == "wandb":
        options = {"wandb": {"name": config.name, "dir": str(config.output)}}
        accelerator.init_trackers("restune-diffusion", config=config.recorded(), init_kwargs=options)
    else:
        accelerator.init_trackers("logs")
