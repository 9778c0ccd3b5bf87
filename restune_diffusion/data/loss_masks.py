"""Loss masks: weight of the loss over the area of a training image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..imaging.masks import load_mask
from ..utils.errors import DataError
from .conventions.label_files import MASK_LABEL
from .conventions.partner_files import PartnerFiles
from .example import Example
from .image_files import Crop, same_shape


def alpha_mask(example: Example, layer: Image.Image) -> Image.Image:
    """Return the alpha channel of an image as its mask; all white if it has no alpha channel."""
    return layer.getchannel("A") if layer.mode == "RGBA" else Image.new("L", layer.size, 255)


class MaskFiles:
    """Masks in a folder, with the file names of the training images, or beside the images as `NAME-masklabel.png`.

    Args:
        folder: folder of masks; None for masks beside the images.
        root: folder of the training images.

    Raises:
        DataError: if the folder does not exist, or is inside the folder of training images.
    """

    def __init__(self, folder: Path | None, root: Path) -> None:
        if folder is not None and not folder.is_dir():
            raise DataError(f"The folder of masks {folder} does not exist.")
        if folder is not None and folder.resolve().is_relative_to(root.resolve()):
            raise DataError(
                f"{folder} lies inside the image folder; move the masks out of it, or name them NAME{MASK_LABEL}.png "
                f"and leave out --mask-data."
            )
        self._folder = folder
        self._files = PartnerFiles(root, root, MASK_LABEL) if folder is None else PartnerFiles(folder, root)

    def __call__(self, example: Example, layer: Image.Image) -> Image.Image:
        """Return the mask of an image, grayscale, white in the trained area.

        Raises:
            DataError: if the mask does not exist, cannot be read, or has another aspect ratio than the image. The
                message continues a sentence that starts with the name of the image.
        """
        path = self._files.of(example.path)
        if path is None:
            beside = (
                f"has no mask {example.path.stem}{MASK_LABEL}.png beside it; add it, or give masks with --mask-data"
            )
            raise DataError(beside if self._folder is None else f"has no mask of the same name in {self._folder}")
        try:
            mask = load_mask(path)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise almost anything on a broken file
            raise DataError(f"has a mask that cannot be read ({path})") from error
        height, width = mask.shape
        if not same_shape((width, height), layer.size):
            raise DataError(
                f"has {layer.width} x {layer.height} pixels, but its mask {path} {width} x {height}; "
                f"give both the same shape"
            )
        return Image.fromarray((mask.numpy() * 255).round().astype(np.uint8))


MaskSource = Callable[[Example, Image.Image], Image.Image]
"""Function that returns the mask of an image, grayscale, white in the trained area."""


def cropped_mask(mask: Image.Image, crop: Crop) -> torch.Tensor:
    """Return the crop of a mask as 1 x height x width, float32 in [0, 1]."""
    # Lanczos would ring at the edges of a mask.
    cropped = np.asarray(crop.apply(mask, Image.Resampling.BILINEAR)).astype(np.float32)
    return torch.from_numpy(cropped / 255)[None]


def latent_mask(mask: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Return a mask averaged over the area of each latent pixel; `size` is the latent's, channels x height x width."""
    return torch.nn.functional.adaptive_avg_pool2d(mask, (size[-2], size[-1]))
