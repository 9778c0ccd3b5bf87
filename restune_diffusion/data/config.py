"""Settings of the training data: what `restune train` and `restune data inspect` have in common."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from ..utils.setting_groups import SettingGroup, setting


class DataConfig(SettingGroup):
    """Which pictures and captions are trained on, and how they are cut."""

    folder: Path = setting(flat="data", affects="batches", recorded=False)
    """Folder of images. Captions: `metadata.jsonl` or `metadata.csv` (file_name, text), or a `.txt` beside each image,
    or --prompt. Or a dataset that the library `datasets` saved with `save_to_disk`. What cannot be used is left out
    and listed with the reason."""
    prompt: str | None = setting(None, affects="content")
    """Caption of every image that has none of its own."""
    image_column: str = setting("image", affects="batches")
    """Column of a saved dataset that has the images."""
    caption_column: str = setting("text", affects="batches")
    """Column of a saved dataset, or of the metadata file, that has the captions."""
    trigger_word: str | None = setting(None, affects="batches", min_length=1)
    """Word that shall call what is trained. Put in front of each caption that does not have it, or where
    --caption-template says; recorded in the tuner's file."""
    caption_template: str | None = setting(None, affects="batches", min_length=1)
    """What becomes of each caption, for instance "{trigger}, {caption}"."""
    folder_repeats: bool = setting(False, affects="batches")
    """Read folders named `10_cat` as kohya's scripts do: each image inside is shown ten times in an epoch, and its
    caption is `cat` where it has none of its own and there is no --prompt."""

    resolution: int | None = setting(None, affects="batches", gt=0)
    """Side of the square training images in pixels; the base's own size where not given."""
    bucketing: bool = setting(False, affects="batches")
    """Keep the images' shapes instead of cutting squares: each goes to the size of nearest shape, all of about the
    area of the square, and the images of one step have one size."""
    max_aspect_ratio: float = setting(3.0, affects="batches", ge=1)
    """Longest size of --bucketing, as long to short side; images beyond are cut."""
    bucket_no_upscale: bool = setting(False, affects="batches")
    """Let images that are smaller than their size keep their own, cut to the grid, instead of enlarging them."""
    crop: Literal["center", "random"] = setting("center", affects="batches")
    """Which part of an image is kept where it does not fit; `random` keeps --crop-variants of them."""
    crop_variants: int = setting(4, affects="batches", gt=1)
    """Number of random parts that are kept of each image; every showing takes one of them."""
    flip: bool = setting(False, affects="batches")
    """Show each image mirrored, left to right, half of the time."""
    background: tuple[int, int, int] = setting((255, 255, 255), affects="batches")
    """Colour behind transparent pixels: red, green, blue, 0 to 255."""

    masked_loss: Literal["alpha", "files"] | None = setting(None, affects="batches")
    """Train on what a mask shows: `alpha` is what is not transparent, `files` are images in --mask-data, white where
    to train."""
    mask_data: Path | None = setting(None, affects="batches", recorded=False)
    """Folder of masks, named as the training images, whatever their suffix."""
    unmasked_weight: float = setting(0.1, affects="batches", ge=0, le=1)
    """Least weight of the loss outside the mask; inside it is 1."""

    @model_validator(mode="after")
    def _data_settings_fit_together(self) -> DataConfig:
        if (self.mask_data is not None) != (self.masked_loss == "files"):
            raise ValueError("mask_data and masked_loss = files need each other")
        if not self.bucketing and (self.bucket_no_upscale or self.max_aspect_ratio != 3.0):
            raise ValueError("max_aspect_ratio and bucket_no_upscale are settings of bucketing, which is off")
        if self.crop == "center" and self.crop_variants != 4:
            raise ValueError("crop_variants are for random crops; set crop to random")
        if self.masked_loss is None and self.unmasked_weight != 0.1:
            raise ValueError("an unmasked weight is given, but the loss is not masked; set masked_loss")
        if not all(0 <= channel <= 255 for channel in self.background):
            raise ValueError("the background is red, green and blue from 0 to 255")
        self._check_template()
        return self

    def _check_template(self) -> None:
        names = re.findall(r"\{([^{}]*)\}", self.caption_template or "")
        unknown = [name for name in names if name not in ("trigger", "caption")]
        if unknown:
            raise ValueError(f"the caption template has {{{unknown[0]}}}, but knows only {{trigger}} and {{caption}}")
        if "trigger" in names and self.trigger_word is None:
            raise ValueError("the caption template has {trigger}, but there is no trigger_word")
