"""Settings of the checkpoints."""

from __future__ import annotations

from ...utils.setting_groups import SettingGroup, setting


class CheckpointsConfig(SettingGroup):
    """Checkpoints, from which a run can be resumed."""

    every: int = setting(500, flat="checkpoint_every", affects="output", ge=0)
    """Save the state of the run every so many steps; 0 never does."""
    kept: int = setting(2, flat="checkpoints_kept", affects="output", gt=0)
    """Number of checkpoints that are kept."""
    resume: bool = setting(False, affects="output", recorded=False)
    """Go on from the newest checkpoint in OUTPUT; the result is the same as without the break."""
