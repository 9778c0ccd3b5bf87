"""Checkpoint settings."""

from __future__ import annotations

from pydantic import model_validator

from ...utils.setting_groups import SettingGroup, setting


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
    resume: bool = setting(False, affects="output", recorded=False)
    """Resume from the newest checkpoint in OUTPUT. The result is the same as that of an uninterrupted run."""

    @model_validator(mode="after")
    def _files_are_saved(self) -> CheckpointsConfig:
        if self.keep_last is not None and not self.save_every:
            raise ValueError("keep_last limits the files of save_every, which is 0; set save_every, or omit keep_last")
        return self
