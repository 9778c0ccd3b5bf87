"""Class preservation settings."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from ...utils.setting_groups import SettingGroup, setting


class PreservationConfig(SettingGroup):
    """Preservation of the subject's class, as in DreamBooth."""

    class_prompt: str | None = setting(None, affects="batches")
    """Prompt for the class of the subject, without the placeholder token: `a dog` if captions contain `a <dog>`."""
    method: Literal["none", "prior", "output"] = setting("none", flat="preservation", affects="batches")
    """Method that keeps other members of the class from looking like the subject. `prior` also trains on class images
    (prior preservation); `output` keeps the base's predictions for --class-prompt and needs no images."""
    prior_loss_weight: float = setting(1.0, affects="batches", gt=0)
    """Weight of the preservation loss."""
    class_data: Path | None = setting(None, affects="batches", recorded=False)
    """Folder of class images for `prior`. If not set, OUTPUT/class-images. The base generates missing images with
    --validation.steps and --validation.guidance. Your own images in the folder are used as they are."""
    num_class_images: int | None = setting(None, affects="batches", gt=0)
    """Number of class images. If not set, the number of your own images in the folder, or 100 if it has none."""
    class_batch_size: int = setting(4, affects="output", recorded=False, gt=0)
    """Class images generated at once, in each process; lower it if they do not fit into memory."""

    @model_validator(mode="after")
    def _settings_are_of_the_method(self) -> PreservationConfig:
        if self.method == "none" and (self.class_data, self.num_class_images, self.prior_loss_weight) != (
            None, None, 1.0,
        ):  # fmt: skip
            raise ValueError(
                "class_data, num_class_images or prior_loss_weight is set, but preservation is none; "
                "add `--preservation prior` or `--preservation output`"
            )
        if self.method == "output" and (self.class_data, self.num_class_images) != (None, None):
            raise ValueError(
                "output preservation uses no class images; leave class_data and num_class_images out, "
                "or choose `prior`"
            )
        if self.method != "none" and not (self.class_prompt and self.class_prompt.strip()):
            raise ValueError('preservation needs a class prompt; give --class-prompt, for instance "a dog"')
        return self
