"""Checkpoint settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from pydantic import model_validator

from ...utils.setting_groups import SettingGroup, setting
from ..validation.measurements import VALIDATION_LOSS
from .validation import CheckpointMetric


class CheckpointsConfig(SettingGroup):
    """How often checkpoints and tuner files are saved, how many are kept, and whether to resume."""

    every: int = setting(500, flat="checkpoint_every", affects="output", ge=0)
    """Save a checkpoint of the training state every N steps and after the last one; 0 saves none."""
    kept: int = setting(2, flat="checkpoints_kept", affects="output", gt=0)
    """Number of checkpoints to keep; older ones are deleted."""
    save_every: int = setting(0, affects="output", recorded=False, ge=0)
    """Write a finished tuner file OUTPUT/NAME-STEP.safetensors every N steps, in addition to the last one; 0 writes
    none. Unlike a checkpoint it holds the averaged weights, if there are any, and nothing to resume from."""
    keep_last: int | None = setting(None, affects="output", recorded=False, gt=0)
    """Number of these files to keep; older ones are deleted. If not set, all are kept."""
    keep: Literal["best"] | None = setting(None, affects="output", recorded=False)
    """Tuner to keep beside the last one. `best` keeps the tuner with the best measurement so far as
    OUTPUT/NAME.best.safetensors."""
    best_by: str = setting(VALIDATION_LOSS, affects="output", recorded=False)
    """Measurement that --keep best and --patience go by: validation_loss, which needs --validation.holdout, or one of
    --validation.metrics."""
    patience: int | None = setting(None, affects="output", recorded=False, gt=0)
    """Stop early, after this number of measurements in a row without a new best one."""
    resume: bool = setting(False, affects="output", recorded=False)
    """Resume from the newest checkpoint in OUTPUT. The result is the same as that of an uninterrupted run."""

    @model_validator(mode="after")
    def _files_are_saved(self) -> CheckpointsConfig:
        if self.keep_last is not None and not self.save_every:
            raise ValueError("keep_last limits the files of save_every, which is 0; set save_every, or omit keep_last")
        return self

    def check_measured(self, measured: Sequence[str]) -> None:
        """Raise `ValueError` if the run does not measure what these settings go by.

        Args:
            measured: names of the run's measurements.
        """
        used = [name for name, value in (("keep best", self.keep), ("patience", self.patience)) if value is not None]
        if not used and self.best_by != VALIDATION_LOSS:
            raise ValueError("best_by is for keep and patience; set keep to best or patience to a number, or omit it")
        if not used or self.best_by in measured:
            return
        if not measured:
            raise ValueError(
                f"{used[0]} needs a measurement, but nothing is measured; hold out images with validation.holdout"
            )
        measurable = self.best_by in get_args(CheckpointMetric)
        raise ValueError(
            f"{used[0]} goes by {self.best_by}, which is not measured; set best_by to {' or '.join(measured)}"
            + (f", or add {self.best_by} to validation.metrics" if measurable else "")
        )
