"""The masks that say on which part of an image to train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..imaging.masks import load_mask
from ..utils.errors import DataError
from .example import Example
from .files import list_images
from .image_files import Crop, same_shape


def alpha_mask(example: Example, layer: Image.Image) -> Image.Image:
    """Return what is not transparent in an image, white; all of it where it has no alpha channel."""
    return layer.getchannel("A") if layer.mode == "RGBA" else Image.new("L", layer.size, 255)


class MaskFiles:
    """Masks in a folder, under the names of the training images, whatever their suffix.

    Args:
        folder: the folder.
        root: folder of the training images.

    Raises:
        DataError: if the folder does not exist, or lies among the images.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        if not folder.is_dir():
            raise DataError(f"The folder of masks {folder} does not exist.")
        if folder.resolve().is_relative_to(root.resolve()):
            raise DataError(f"{folder} lies inside the image folder; move the masks out of it.")
        self._folder = folder
        self._root = root
        self._files = {path.relative_to(folder).with_suffix(""): path for path in list_images(folder)}

    def __call__(self, example: Example, layer: Image.Image) -> Image.Image:
        """Return the mask of an image, white where to train.

        Raises:
            DataError: if there is none, it cannot be read, or has another shape than the image; said as the rest of
                a sentence that begins with the image.
        """
        path = self._file(example)
        if path is None:
            raise DataError(f"has no mask of its name in {self._folder}")
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

    def _file(self, example: Example) -> Path | None:
        if not example.path.is_relative_to(self._root):
            return None
        return self._files.get(example.path.relative_to(self._root).with_suffix(""))


MaskSource = Callable[[Example, Image.Image], Image.Image]
"""Returns the mask of an image, grey, white where to train."""


def cropped_mask(mask: Image.Image, crop: Crop) -> torch.Tensor:
    """Cut a mask as its image is cut; 1 x height x width, float32, from 0 to 1."""
    # Lanczos would ring at the edges of a mask.
    cut = np.asarray(crop.apply(mask, Image.Resampling.BILINEAR)).astype(np.float32)
    return torch.from_numpy(cut / 255)[None]


def latent_mask(mask: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Average a mask over the area of each latent pixel; `size` is the latent's, channels x height x width."""
    return torch.nn.functional.adaptive_avg_pool2d(mask, (size[-2], size[-1]))
