"""Logging with accelerate's trackers, in addition to `metrics.jsonl`."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available

from ..config.train_config import TrainConfig
from .tracker_names import check_tracker


def tracker_name(log_with: str) -> str | None:
    """Return the name of accelerate's tracker, or None; `auto` is TensorBoard if it is installed.

    Raises:
        TrainingError: if the tracker is not installed; accelerate would log nothing and raise no error.
    """
    if log_with == "auto":
        return "tensorboard" if is_tensorboard_available() else None
    if log_with == "none":
        return None
    check_tracker(log_with)
    return log_with


def start_trackers(accelerator: Accelerator, config: TrainConfig) -> None:
    """Start the trackers: TensorBoard in OUTPUT/logs, or a run with the tuner's name in the wandb project."""
    if tracker_name(config.log_with) == "wandb":
        options = {"wandb": {"name": config.name, "dir": str(config.output)}}
        accelerator.init_trackers("restune-diffusion", config=config.recorded(), init_kwargs=options)
    else:
        accelerator.init_trackers("logs")
