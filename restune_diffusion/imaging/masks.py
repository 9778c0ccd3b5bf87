"""Spatial masks of a tuner's weight, read from images."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..utils.errors import RestuneError
from .upright import decode_upright


def mask_from_image(image: Image.Image) -> torch.Tensor:
    """Convert an image to a mask: the tuner acts on white, does not act on black, and partially on gray.

    Args:
        image: an image of any mode and size; transparent pixels count as black.

    Returns:
        `(height, width)`, float32, from 0 to 1, for `TunerWeight(mask=...)`.
    """
    if image.mode.startswith("I;16"):
        # Pillow would clip 16-bit values at 255.
        return torch.from_numpy(np.asarray(image).astype(np.float32) / 65535)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return torch.from_numpy(np.asarray(image.convert("L")).astype(np.float32) / 255)


def load_mask(path: str | os.PathLike[str]) -> torch.Tensor:
    """Read a mask from an image file; see `mask_from_image`.

    Raises:
        RestuneError: if the file cannot be read as an image.
    """
    try:
        return mask_from_image(decode_upright(Path(path).expanduser().read_bytes()))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RestuneError(f"The mask {path} cannot be read as an image: {reason}") from error
