"""Condition images for control tuners, computed from images without any model.

Each maker (`canny`, `palette`, `blur`, `mask`) takes a PIL image of any mode and returns one of the same size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageFilter

from ..utils.errors import ConditionError
from .canny import canny_edges
from .rgb import has_transparency, to_rgb

Maker: TypeAlias = Callable[[Image.Image], Image.Image]

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def canny(image: Image.Image, low: float = 100, high: float = 200) -> Image.Image:
    """Return the edges, white on black, as OpenCV's `Canny` computes them.

    Args:
        image: source image; transparent pixels count as white.
        low: lower hysteresis threshold: gradients above it belong to an edge if they touch one.
        high: upper hysteresis threshold: gradients above it are an edge.
    """
    return Image.fromarray(canny_edges(np.asarray(to_rgb(image)), low, high).astype(np.uint8) * 255)


def palette(image: Image.Image, cells: int = 8) -> Image.Image:
    """Fill every cell of a coarse grid with its mean color.

    Args:
        image: source image; transparent pixels count as white.
        cells: number of cells along the shorter side.
    """
    rgb = to_rgb(image)
    cell = min(rgb.size) / cells
    grid = max(1, round(rgb.width / cell)), max(1, round(rgb.height / cell))
    return rgb.resize(grid, Image.Resampling.BOX).resize(rgb.size, Image.Resampling.NEAREST)


def blur(image: Image.Image, radius: float = 1 / 16) -> Image.Image:
    """Blur an image with a Gaussian filter.

    Args:
        image: source image; transparent pixels count as white.
        radius: standard deviation of the Gaussian, as a fraction of the shorter side.
    """
    rgb = to_rgb(image)
    return rgb.filter(ImageFilter.GaussianBlur(radius * min(rgb.size)))


def mask(image: Image.Image, threshold: float = 0.1) -> Image.Image:
    """Return a foreground mask: the foreground white, the background black.

    Args:
        image: source image. An alpha channel, if there is one, decides at one half; otherwise the difference from
            the background color, which is the median of the outermost pixels.
        threshold: smallest difference of a foreground pixel in any color channel, from 0 to 1.
    """
    if has_transparency(image):
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
        return Image.fromarray(np.where(alpha >= 128, 255, 0).astype(np.uint8))
    pixels = np.asarray(to_rgb(image)).astype(np.float32) / 255
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    difference = np.abs(pixels - np.median(border, axis=0)).max(axis=-1)
    return Image.fromarray(np.where(difference > threshold, 255, 0).astype(np.uint8))


MAKERS: Mapping[str, Maker] = MappingProxyType({"canny": canny, "palette": palette, "blur": blur, "mask": mask})
"""Condition makers by name."""


def make_condition(name: str, image: Image.Image) -> Image.Image:
    """Compute a condition image with the maker of a name.

    Raises:
        ConditionError: if there is no maker of that name.
    """
    if name not in MAKERS:
        raise ConditionError(f"There is no condition maker named {name!r}; choose one of {', '.join(MAKERS)}.")
    return MAKERS[name](image)


def condition_to_tensor(image: Image.Image, channels: int = 3) -> torch.Tensor:
    """Convert a condition image to a uint8 tensor `(channels, height, width)`.

    Raises:
        ConditionError: if `channels` is not 1, 3 or 4.
    """
    if channels not in _MODES:
        raise ConditionError(f"An image has 1, 3 or 4 channels, but the condition needs {channels}; pass tensors.")
    converted = image.convert("RGBA") if channels == 4 else to_rgb(image).convert(_MODES[channels])
    pixels = np.array(converted).reshape(converted.height, converted.width, channels)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
