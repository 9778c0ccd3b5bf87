"""Load the training images with their captions, masks and condition images."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ..imaging.image_files import decode_layer
from ..imaging.rgb import to_rgb
from ..utils.errors import DataError
from .caption_variants.variants import CaptionVariants
from .condition_source import ConditionSource
from .example import Example
from .image_files import Crop, SizeConditioning
from .image_transform import ImageTransform
from .loss_masks import cropped_mask
from .refusals import Refused

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One view (crop) of a training image, with its caption.

    Attributes:
        pixels: the cropped image, 3 x height x width, float32 in [-1, 1].
        caption: training caption.
        size_conditioning: original size, crop corner and target size.
        digest: SHA-256 of the image file.
        conditions: condition images, uint8, each channels x height x width.
        mask: loss mask, 1 x height x width in [0, 1]; None for an unmasked loss.
        further: True for every view of an image except the first; random crops and flips give several views.
        repeats: number of times that an epoch uses the image.
        name: path of the image.
        variants: captions of which each use of the image picks one; None if there is only `caption`.
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
    variants: CaptionVariants | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """Captions that the image is trained with, all with the same probability."""
        return self.variants.texts if self.variants is not None else (self.caption,)


def load_samples(
    examples: Sequence[Example],
    resolution: int,
    source: ConditionSource | None = None,
    *,
    preparation: ImageTransform | None = None,
    refused: list[Refused] | None = None,
) -> Iterator[Sample]:
    """Yield the views of each example, one image at a time; images that cannot be used are skipped.

    Args:
        examples: the training examples.
        resolution: side of the square that images are resized to, in pixels.
        source: source of the condition images; None for training without conditions.
        preparation: transform of the images; the center square of `resolution` by default.
        refused: list that receives the skipped images; without it each one is logged as a warning.
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
            _refuse(Refused(str(example.path), "is not an image of a known format"), refused)
        except Exception as error:  # Pillow's decoders raise almost anything on a broken file
            message = getattr(error, "strerror", None) or str(error)
            reason = " ".join(message.split()) or type(error).__name__
            _refuse(Refused(str(example.path), f"cannot be read as an image ({reason})"), refused)
        else:
            yield from samples


def _views(example: Example, preparation: ImageTransform, source: ConditionSource | None) -> list[Sample]:
    layer, digest = decode_layer(example.read())
    image = to_rgb(layer, preparation.background)
    whole = preparation.masks(example, layer) if preparation.masks is not None else None
    samples = []
    for number, crop in enumerate(preparation.crops(layer.size, digest)):
        mask = cropped_mask(whole, crop) if whole is not None else None
        if mask is not None and not mask.any():
            raise DataError("has a mask that is black over the whole crop")
        samples.append(
            Sample(
                to_tensor(crop.apply(image)),
                example.caption,
                crop.size_conditioning(layer.size),
                digest,
                _conditions(source, example, layer, crop) if source is not None else (),
                mask,
                further=number > 0,
                repeats=example.repeats,
                name=str(example.path),
                variants=example.variants,
            )
        )
    return samples


def _conditions(source: ConditionSource, example: Example, layer: Image.Image, crop: Crop) -> tuple[torch.Tensor, ...]:
    try:
        return source.tensors(example, layer, crop)
    except DataError as error:
        raise DataError(f"has no usable condition image: {error}") from error


def _refuse(refusal: Refused, refused: list[Refused] | None) -> None:
    if refused is None:
        logger.warning("Left out: %s", refusal)
    else:
        refused.append(refusal)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Return an RGB image as 3 x height x width in [-1, 1], float32."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
