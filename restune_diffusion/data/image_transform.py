"""Resize, crop and flip of training images before VAE encoding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..utils.errors import DataError
from ..utils.seeds import seeded
from .buckets import Buckets, bucket_sizes
from .config import DataConfig
from .image_files import Crop, centred
from .loss_masks import MaskFiles, MaskSource, alpha_mask

# Limits of aspect ratio and upscaling: beyond them the resized image is only a blur.
_LONGEST = 20
_ENLARGED = 16


@dataclass(frozen=True)
class ImageTransform:
    """Transform from an image to its crops; the defaults give center squares.

    Encoded images are cached. Random crops are therefore drawn once, here, and each training step uses one of them.

    Attributes:
        buckets: target sizes.
        crop_variants: number of random crops kept of an image; None keeps the center crop.
        flip: whether every crop is also kept mirrored.
        background: color behind transparent pixels: red, green, blue, 0 to 255.
        masks: source of the loss masks; None for an unmasked loss.
        seed: seed of the random crops.
    """

    buckets: Buckets
    crop_variants: int | None = None
    flip: bool = False
    background: tuple[int, int, int] = (255, 255, 255)
    masks: MaskSource | None = None
    seed: int = 0

    @classmethod
    def square(cls, resolution: int) -> ImageTransform:
        """Return the transform to center squares of one size."""
        return cls(Buckets([(resolution, resolution)]))

    @classmethod
    def of(cls, config: DataConfig, resolution: int, step: int, seed: int) -> ImageTransform:
        """Return the transform of a config.

        Args:
            config: settings of the data.
            resolution: side of the square, in pixels.
            step: step of the bucket sizes, in pixels.
            seed: seed of the run.

        Raises:
            DataError: if the folder of masks cannot be used.
        """
        buckets = Buckets([(resolution, resolution)])
        if config.bucketing:
            buckets = Buckets(
                bucket_sizes(resolution, step, config.max_aspect_ratio),
                step if config.bucket_no_upscale else None,
                config.max_aspect_ratio,
            )
        masks: MaskSource | None = alpha_mask if config.masked_loss == "alpha" else None
        if config.masked_loss == "files":
            masks = MaskFiles(config.mask_data, config.folder)
        crop_variants = config.crop_variants if config.crop == "random" else None
        return cls(buckets, crop_variants, config.flip, config.background, masks, seed)

    def crops(self, original: tuple[int, int], digest: bytes) -> list[Crop]:
        """Return the crops of an image.

        Args:
            original: size of the image, (width, height) in pixels.
            digest: hash of the image. Random crops depend on it and the seed, not on other images of the folder.

        Raises:
            DataError: if the image is too long or too small. The message continues a sentence that starts with the
                name of the image.
        """
        width, height = original
        if max(original) > _LONGEST * min(original):
            raise DataError(f"has {width} x {height} pixels; an aspect ratio above {_LONGEST} to 1 is not supported")
        crop = centred(original, self.buckets.choose(original))
        if crop.scaled[0] > _ENLARGED * width:
            raise DataError(
                f"has {width} x {height} pixels, which would have to be enlarged more than {_ENLARGED} times"
            )
        crops = [crop] if self.crop_variants is None else list(self._random(crop, digest))
        return [
            replace(each, mirrored=mirrored)
            for each in crops
            for mirrored in ((False, True) if self.flip else (False,))
        ]

    def _random(self, crop: Crop, digest: bytes) -> Iterator[Crop]:
        generator = seeded(self.seed, f"cuts of {digest.hex()}", 0)
        right, down = crop.slack
        corners = [
            tuple(int(torch.randint(most + 1, (), generator=generator)) for most in (right, down))
            for _ in range(self.crop_variants or 0)
        ]
        # An image that fits exactly has one crop.
        for left, top in dict.fromkeys(corners):
            yield replace(crop, corner=(left, top))
