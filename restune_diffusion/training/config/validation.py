"""Settings of the sample images and of the drift, which show how training goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import model_validator

from ...utils.setting_groups import setting
from ...utils.settings import Settings
from .renamed import renamed


class ValidationConfig(Settings):
    """Sample images that show how training goes."""

    prompts: tuple[str, ...] = setting((), affects="output")
    """Prompts to draw; without any, no samples are made."""
    every: int = setting(0, affects="output", ge=0)
    """Draw every so many steps; 0 draws only at the start and the end."""
    steps: int = setting(25, affects="output", gt=0)
    """Denoising steps of a sample."""
    guidance: float = setting(7.5, affects="output", ge=0)
    """Classifier-free guidance of a sample."""
    seed: int = setting(0, affects="output")
    """Seed of every sample, so that the images of two steps differ by the training alone."""
    # The files of before know these by their old name.
    drift_prompts: tuple[str, ...] | None = setting(None, affects="output", recorded="leak_prompts")
    """Prompts without the subject, for which the drift from the base is logged as `leak`, in percent; --class-prompt
    where not given."""
    control_images: tuple[Path, ...] = setting((), affects="output", recorded=False)
    """What steers the samples of a control tuner: for each prompt one image for each condition. As in training, these
    are condition images, or pictures to make them from where the condition is made."""

    @model_validator(mode="before")
    @classmethod
    def _new_names(cls, values: Any) -> Any:
        return renamed(values, within="validation.").values if isinstance(values, dict) else values
