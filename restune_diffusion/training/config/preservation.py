"""Settings of what preserves a subject's class."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from ...utils.setting_groups import SettingGroup, setting


class PreservationConfig(SettingGroup):
    """Preservation of other things of the subject's class, as in DreamBooth."""

    class_prompt: str | None = setting(None, affects="batches")
    """What the subject is one of, said without its word: `a dog` where the captions say `a <dog>`."""
    method: Literal["none", "prior", "output"] = setting("none", flat="preservation", affects="batches")
    """What keeps other things of the class from looking like the subject: `prior` trains on class images beside the
    subject's, `output` keeps the base's own predictions for --class-prompt and needs no images."""
    prior_loss_weight: float = setting(1.0, affects="batches", gt=0)
    """Weight of the loss that preserves."""
    class_data: Path | None = setting(None, affects="batches", recorded=False)
    """Folder of class images for `prior`, OUTPUT/class-images where not given. The base draws what is missing, as many
    steps and with the guidance of the validation samples. Images of your own in it are used as they are."""
    num_class_images: int | None = setting(None, affects="batches", gt=0)
    """Number of class images; 100 where not given, or those of your own where the folder has any."""

    @model_validator(mode="after")
    def _settings_are_of_the_method(self) -> PreservationConfig:
        if self.method == "none" and (self.class_data, self.num_class_images, self.prior_loss_weight) != (
            None, None, 1.0,
        ):  # fmt: skip
            raise ValueError("settings of preservation are given; choose one, `--preservation prior` or `output`")
        if self.method == "output" and (self.class_data, self.num_class_images) != (None, None):
            raise ValueError("output preservation needs no class images; leave them out, or choose `prior`")
        if self.method != "none" and not (self.class_prompt and self.class_prompt.strip()):
            raise ValueError('preservation needs to know the class; give --class-prompt, for instance "a dog"')
        return self
