"""Load the training images, each with its caption and the images that are to steer it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ..errors import DataError
from ..images import to_rgb
from .captions import Example
from .condition_source import ConditionSource
from .pictures import Geometry, centre_square, read_layer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """A training image in [-1, 1], 3 x height x width, with its caption and the hash of its file.

    `conditions` are the images that steer it, uint8, each channels x height x width.
    """

    pixels: torch.Tensor
    caption: str
    geometry: Geometry
    digest: bytes
    conditions: tuple[torch.Tensor, ...] = ()


def load_samples(
    examples: Sequence[Example], resolution: int, source: ConditionSource | None = None
) -> Iterator[Sample]:
    """Load one image after the other; name those that cannot be used in a warning and leave them out.

    Args:
        examples: the files.
        resolution: side of the square that each image is brought to, in pixels.
        source: where the images that steer come from; without it there are none.
    """
    for example in examples:
        try:
            layer, digest = read_layer(example.path)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise almost anything on a broken file
            logger.warning("Skipped %s: it cannot be read as an image (%s).", example.path, error)
            continue
        try:
            conditions = source.tensors(example, layer, resolution) if source is not None else ()
        except DataError as error:
            logger.warning("Skipped %s: %s", example.path, error)
            continue
        pixels, geometry = fit(to_rgb(layer), resolution)
        yield Sample(pixels, example.caption, geometry, digest, conditions)


def fit(image: Image.Image, resolution: int) -> tuple[torch.Tensor, Geometry]:
    """Scale the shorter side of an RGB image to the resolution and crop the centre square."""
    square, geometry = centre_square(image, resolution)
    pixels = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 127.5 - 1
    return pixels, geometry
