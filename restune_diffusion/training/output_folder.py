"""Files of a run in its output folder, and checks of the folder before the work."""

from __future__ import annotations

import re
from pathlib import Path

from ..utils.errors import TrainingError
from .config.train_config import TrainConfig

CONFIG_FILE = "config.yaml"
"""File name of the settings of a run."""
_NAME = re.compile(r"checkpoint-(\d{6,})")


def list_checkpoints(output: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found = [(int(match[1]), path) for path in output.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def latest_checkpoint(output: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None."""
    return next(reversed(list_checkpoints(output)), None)


def step_files(config: TrainConfig) -> list[Path]:
    """Return the tuner files of single steps in a run's output folder, in the order of their steps."""
    name = re.compile(rf"{re.escape(config.name)}-(\d{{6,}})\.safetensors")
    found = [(int(match[1]), path) for path in config.output.glob("*") if (match := name.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def best_file(config: TrainConfig) -> Path:
    """Return the path of the tuner file with the best measurement."""
    return config.output / f"{config.name}.best.safetensors"


def check_output(config: TrainConfig) -> None:
    """Check the output folder.

    Raises:
        TrainingError: if it lies inside the image folder, or contains a run or a tuner that would be overwritten.
    """
    if config.output.resolve().is_relative_to(config.data.folder.resolve()):
        raise TrainingError(
            f"{config.output} lies inside the image folder, where the samples would become training images; "
            f"choose another output folder."
        )
    found = latest_checkpoint(config.output)
    if found is not None and not config.checkpoints.resume:
        raise TrainingError(
            f"{config.output} holds {found.name} of an earlier run; add --resume to continue it, "
            f"or choose another output folder."
        )
    if found is None and config.file.exists():
        raise TrainingError(
            f"{config.file} is a finished tuner without a checkpoint to resume, and this run would replace it; choose "
            "another --output or --name, or move the file away."
        )
    saved = [*step_files(config), *(path for path in [best_file(config)] if path.exists())]
    if saved and not config.checkpoints.resume:
        raise TrainingError(
            f"{config.output} holds {saved[-1].name} of an earlier run, which this run could replace; "
            f"choose another output folder or another name."
        )
