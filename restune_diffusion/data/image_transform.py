"""How each image is cut before it is encoded, and in how many views."""

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

# Beyond these an image is a line or a few pixels, of which training would see a blur.
_LONGEST = 20
_ENLARGED = 16


@dataclass(frozen=True)
class ImageTransform:
    """What becomes of an image; the defaults cut centre squares.

    As the encoded images are kept, what is random about a cut is drawn here, and each step takes one of these views.

    Attributes:
        buckets: the sizes.
        crop_variants: number of random cuts that are kept of an image; None keeps the centre.
        flip: whether every cut is kept mirrored too.
        background: colour behind transparent pixels, red, green, blue.
        masks: where the masks of the loss come from, if it is masked.
        seed: seed of the random cuts.
    """

    buckets: Buckets
    crop_variants: int | None = None
    flip: bool = False
    background: tuple[int, int, int] = (255, 255, 255)
    masks: MaskSource | None = None
    seed: int = 0

    @classmethod
    def square(cls, resolution: int) -> ImageTransform:
        """Cut squares of one size."""
        return cls(Buckets([(resolution, resolution)]))

    @classmethod
    def of(cls, config: DataConfig, resolution: int, step: int, seed: int) -> ImageTransform:
        """Prepare images as a config asks.

        Args:
            config: settings of the data.
            resolution: side of the square, in pixels.
            step: step of the sizes of buckets.
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
        if config.mask_data is not None:
            masks = MaskFiles(config.mask_data, config.folder)
        crop_variants = config.crop_variants if config.crop == "random" else None
        return cls(buckets, crop_variants, config.flip, config.background, masks, seed)

    def crops(self, original: tuple[int, int], digest: bytes) -> list[Crop]:
        """Return the cuts of an image of this size, (width, height).

        Args:
            original: its size in pixels.
            digest: hash of the image, which the random cuts depend on, and not on the images beside it.

        Raises:
            DataError: if it is far too long or small; said as the rest of a sentence.
        """
        width, height = original
        if max(original) > _LONGEST * min(original):
            raise DataError(f"has {width} x {height} pixels, and beyond {_LONGEST} to 1 it is but a line")
        crop = centred(original, self.buckets.choose(original))
        if crop.scaled[0] > _ENLARGED * width:
            raise DataError(
                f"has {width} x {height} pixels, which would have to be enlarged more than {_ENLARGED} times"
            )
        cuts = [crop] if self.crop_variants is None else list(self._random(crop, digest))
        return [
            replace(cut, mirrored=mirrored) for cut in cuts for mirrored in ((False, True) if self.flip else (False,))
        ]

    def _random(self, crop: Crop, digest: bytes) -> Iterator[Crop]:
        generator = seeded(self.seed, f"cuts of {digest.hex()}", 0)
        right, down = crop.slack
        corners = [
            tuple(int(torch.randint(most + 1, (), generator=generator)) for most in (right, down))
            for _ in range(self.crop_variants or 0)
        ]
        # An image that fits has but one cut.
        for left, top in dict.fromkeys(corners):
            yield replace(crop, corner=(left, top))
