"""Checks of a run before the libraries are imported, which takes seconds: paths, base, logger and device."""

from __future__ import annotations

from pathlib import Path

from ..storage.base_files.check import check_base
from ..utils.early_checks.folders import check_data, check_writable
from ..utils.early_checks.machine import check_precision
from .callbacks.tracker_names import check_tracker
from .config.teacher.files import check_teacher_files
from .config.train_config import TrainConfig
from .output_folder import check_output


def check_before_training(config: TrainConfig) -> None:
    """Check what can be checked of a run without torch, or of the runs of a sweep.

    Raises:
        RestuneError: if a path, the base, the logger or the precision cannot be used.
    """
    check_teacher_files(config.teacher)
    if not config.teacher.generates:
        check_data(config.data.folder)
    if isinstance(config.validation.holdout, Path):
        check_data(config.validation.holdout, "folder of held-out images")
    check_writable(config.output)
    if config.sweep is None:
        check_output(config)
    check_tracker(config.log_with)
    check_base(config.base, config.vae)
    check_precision(config.memory.mixed_precision, cpu=config.memory.cpu)
