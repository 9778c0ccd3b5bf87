"""Settings of the training data, shared by `restune train` and `restune data inspect`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from ..utils.setting_groups import SettingGroup, setting


class DataConfig(SettingGroup):
    """Images and captions to train on, their size, crops and masks."""

    folder: Path = setting(flat="data", affects="batches", recorded=False)
    """Folder of images, or a dataset saved with `save_to_disk` of the library `datasets`. Captions come from
    `metadata.jsonl` or `metadata.csv` (columns file_name and text), here or in the subfolder `train`, from a `.txt` or
    `.caption` file next to each image, or from --prompt. Images that cannot be used are skipped and listed with the
    reason."""
    prompt: str | None = setting(None, affects="content")
    """Caption of every image without a caption of its own."""
    image_column: str = setting("image", affects="batches")
    """Image column of a saved dataset."""
    caption_column: str = setting("text", affects="batches")
    """Caption column of a saved dataset or of the metadata file."""
    trigger_word: str | None = setting(None, affects="batches", min_length=1)
    """Trigger word for prompts. It is inserted at the start of each caption without it, or at the place given by
    --caption-template, and recorded in the tuner's file."""
    caption_template: str | None = setting(None, affects="batches", min_length=1)
    """Template for each caption, for instance "{trigger}, {caption}"."""
    captions: Literal["one", "all"] = setting("one", affects="content", recorded_default=False)
    """`one`: the whole text of a caption file, or the first item of a list, is the caption of its image. `all`: each
    line and each item of a list is a caption, and each use of the image picks one of them."""
    shuffle_tags: bool = setting(False, affects="content", recorded_default=False)
    """Shuffle the comma-separated tags of captions. Tags that contain the trigger word or a placeholder token stay in
    front and are never dropped."""
    keep_tags: int = setting(0, affects="content", recorded_default=False, ge=0)
    """Number of tags at the start of a caption that are neither shuffled nor dropped."""
    keep_tags_separator: str | None = setting(None, affects="content", recorded_default=False, min_length=1)
    """Separator, for instance "|||", that replaces --keep-tags in the captions that contain it. Tags before it, and
    those after a second one, are neither shuffled nor dropped."""
    tag_dropout: float = setting(0.0, affects="content", recorded_default=False, ge=0, lt=1)
    """Probability of leaving out each tag."""
    wildcards: bool = setting(False, affects="content", recorded_default=False)
    """Replace `{a|b|c}` in captions by one of the options. `{{` and `}}` stand for braces."""
    caption_variants: int = setting(8, affects="content", recorded_default=False, gt=1)
    """Number of variants of each image's captions if tags are shuffled or dropped or wildcards are replaced. They are
    chosen from the seed and encoded once, and each use of the image picks one of them."""
    folder_repeats: bool = setting(False, affects="batches")
    """Read folder names such as `10_cat` as kohya's scripts do: the images inside are repeated 10 times per epoch, and
    `cat` is the caption of images without one if --prompt is not set."""

    resolution: int | None = setting(None, affects="batches", gt=0)
    """Side length of the square training images in pixels. If not set, the native size of the base."""
    bucketing: bool = setting(False, affects="batches")
    """Aspect ratio bucketing instead of square crops. Each image goes to the bucket of nearest aspect ratio; all
    buckets have about the area of the square, and the images of one step come from one bucket."""
    max_aspect_ratio: float = setting(3.0, affects="batches", ge=1)
    """Largest aspect ratio of a bucket, long side divided by short side; more elongated images are cropped."""
    bucket_no_upscale: bool = setting(False, affects="batches")
    """Do not upscale images that are smaller than their bucket; crop them to a multiple of the bucket step instead."""
    crop: Literal["center", "random"] = setting("center", affects="batches")
    """Crop of images that do not fit; `random` caches --crop-variants random crops per image."""
    crop_variants: int = setting(4, affects="batches", gt=1)
    """Number of random crops per image; each use of the image picks one of them."""
    flip: bool = setting(False, affects="batches")
    """Flip images horizontally with probability 0.5."""
    background: tuple[int, int, int] = setting((255, 255, 255), affects="batches")
    """Background color behind transparent pixels: red, green and blue, each from 0 to 255."""

    masked_loss: Literal["alpha", "files"] | None = setting(None, affects="batches")
    """Weight the loss with a mask: `alpha` uses the alpha channel of the images, `files` uses mask images,
    white where to train."""
    mask_data: Path | None = setting(None, affects="batches", recorded=False)
    """Folder of mask images with the same file names as the training images; the extensions may differ. If not set,
    `--masked-loss files` reads OneTrainer's masks beside the images, `NAME-masklabel.png`."""
    unmasked_weight: float = setting(0.1, affects="batches", ge=0, le=1)
    """Minimum loss weight outside the mask; the weight inside is 1."""

    @model_validator(mode="after")
    def _data_settings_fit_together(self) -> DataConfig:
        if self.mask_data is not None and self.masked_loss != "files":
            raise ValueError("mask_data is given, but masked_loss is not files; set masked_loss to files")
        if not self.bucketing and (self.bucket_no_upscale or self.max_aspect_ratio != 3.0):
            raise ValueError(
                "max_aspect_ratio and bucket_no_upscale are settings of bucketing, which is off; "
                "set bucketing, or leave them out"
            )
        if self.crop == "center" and self.crop_variants != 4:
            raise ValueError("crop_variants is for random crops; set crop to random")
        if self.masked_loss is None and self.unmasked_weight != 0.1:
            raise ValueError("unmasked_weight is given, but the loss is not masked; set masked_loss")
        if not all(0 <= channel <= 255 for channel in self.background):
            raise ValueError(f"background = {self.background} is not valid; use red, green and blue from 0 to 255")
        self._check_template()
        self._check_variants()
        return self

    @property
    def changes_captions(self) -> bool:
        """Whether tags are shuffled or dropped or wildcards are replaced."""
        return self.shuffle_tags or self.tag_dropout > 0 or self.wildcards

    @property
    def has_variants(self) -> bool:
        """Whether an image may have several captions."""
        return self.captions == "all" or self.changes_captions

    def _check_variants(self) -> None:
        if not (self.shuffle_tags or self.tag_dropout):
            name = "keep_tags" if self.keep_tags else "keep_tags_separator" if self.keep_tags_separator else None
            if name is not None:
                raise ValueError(
                    f"{name} is given, but tags are neither shuffled nor dropped; set shuffle_tags or tag_dropout"
                )
        if self.caption_variants != 8 and not self.changes_captions:
            raise ValueError(
                "caption_variants is for shuffle_tags, tag_dropout and wildcards, which are off; set one of them"
            )

    def _check_template(self) -> None:
        names = re.findall(r"\{([^{}]*)\}", self.caption_template or "")
        unknown = [name for name in names if name not in ("trigger", "caption")]
        if unknown:
            raise ValueError(
                f"caption_template contains the unknown field {{{unknown[0]}}}; use {{trigger}} and {{caption}}"
            )
        if "trigger" in names and self.trigger_word is None:
            raise ValueError("caption_template contains {trigger}, but there is no trigger_word; set one")
