"""Checkpoint settings."""

from __future__ import annotations

from ...utils.setting_groups import SettingGroup, setting


class CheckpointsConfig(SettingGroup):
    """How often checkpoints are saved, how many are kept, and whether to resume from one."""

    every: int = setting(500, flat="checkpoint_every", affects="output", ge=0)
    """Save a checkpoint of the training state every N steps and after the last one; 0 saves none."""
    kept: int = setting(2, flat="checkpoints_kept", affects="output", gt=0)
    """Number of checkpoints to keep; older ones are deleted."""
    resume: bool = setting(False, affects="output", recorded=False)
    """Resume from the newest checkpoint in OUTPUT. The result is the same as that of an uninterrupted run."""
