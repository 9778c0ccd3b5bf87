"""Load the training images, each with its caption and the images that are to steer it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ..imaging.rgb import to_rgb
from ..utils.errors import DataError
from .condition_source import ConditionSource
from .example import Example
from .image_files import Crop, SizeConditioning, decode_layer
from .image_transform import ImageTransform
from .loss_masks import cropped_mask
from .refusals import Refused

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """A view of a training image in [-1, 1], 3 x height x width, with its caption and the hash of its file.

    `conditions` are the images that steer it, uint8, each channels x height x width, and `mask` is what of it to train
    on, 1 x height x width in [0, 1]. An image that is cut or mirrored at random has several views; all but the first
    are `further`.
    """

    pixels: torch.Tensor
    caption: str
    size_conditioning: SizeConditioning
    digest: bytes
    conditions: tuple[torch.Tensor, ...] = ()
    mask: torch.Tensor | None = None
    further: bool = False
    repeats: int = 1
    name: str = ""


def load_samples(
    examples: Sequence[Example],
    resolution: int,
    source: ConditionSource | None = None,
    *,
    preparation: ImageTransform | None = None,
    refused: list[Refused] | None = None,
) -> Iterator[Sample]:
    """Load one image after the other, and leave out those that cannot be used.

    Args:
        examples: the files.
        resolution: side of the square that each image is brought to, in pixels.
        source: where the images that steer come from; without it there are none.
        preparation: how images are cut, if not to the centre square of the resolution.
        refused: takes what is left out; without it a warning names it.
    """
    prepared = preparation or ImageTransform.square(resolution)
    for example in examples:
        try:
            samples = _views(example, prepared, source)
        except MemoryError:
            raise
        except DataError as error:
            _refuse(Refused(str(example.path), str(error).rstrip(".")), refused)
        except UnidentifiedImageError:
            _refuse(Refused(str(example.path), "is no image of a known kind"), refused)
        except Exception as error:  # Pillow's decoders raise almost anything on a broken file
            told = getattr(error, "strerror", None) or str(error)
            reason = " ".join(told.split()) or type(error).__name__
            _refuse(Refused(str(example.path), f"cannot be read as an image ({reason})"), refused)
        else:
            yield from samples


def _views(example: Example, preparation: ImageTransform, source: ConditionSource | None) -> list[Sample]:
    layer, digest = decode_layer(example.read())
    picture = to_rgb(layer, preparation.background)
    whole = preparation.masks(example, layer) if preparation.masks is not None else None
    samples = []
    for number, crop in enumerate(preparation.crops(layer.size, digest)):
        mask = cropped_mask(whole, crop) if whole is not None else None
        if mask is not None and not mask.any():
            raise DataError("has a mask that shows nothing of what is kept of it")
        samples.append(
            Sample(
                to_tensor(crop.apply(picture)),
                example.caption,
                crop.size_conditioning(layer.size),
                digest,
                _conditions(source, example, layer, crop) if source is not None else (),
                mask,
                further=number > 0,
                repeats=example.repeats,
                name=str(example.path),
            )
        )
    return samples


def _conditions(source: ConditionSource, example: Example, layer: Image.Image, crop: Crop) -> tuple[torch.Tensor, ...]:
    try:
        return source.tensors(example, layer, crop)
    except DataError as error:
        raise DataError(f"cannot be steered: {error}") from error


def _refuse(refusal: Refused, refused: list[Refused] | None) -> None:
    if refused is None:
        logger.warning("Left out: %s", refusal)
    else:
        refused.append(refusal)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Return an RGB image as 3 x height x width in [-1, 1], float32."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
