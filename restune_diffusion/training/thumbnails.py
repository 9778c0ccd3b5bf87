"""Small pictures of what is trained on, for a person to look at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

from ..imaging.contact_sheet import captioned_grid
from .data import Sample

_COLUMNS, _SHOWN = 6, 60
_CELL = 192


class Thumbnails:
    """Keeps small pictures of what is trained on.

    Args:
        unmasked_weight: least weight of what a mask leaves out, which is shown so much fainter.
    """

    def __init__(self, unmasked_weight: float) -> None:
        self._unmasked_weight = unmasked_weight
        self._kept: dict[tuple[int, int], list[tuple[Image.Image, str]]] = {}

    def watched(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Pass samples on and keep the first of each size."""
        for sample in samples:
            kept = self._kept.setdefault((sample.pixels.shape[2], sample.pixels.shape[1]), [])
            if not sample.further and len(kept) < _SHOWN:
                kept.append((self._picture(sample), sample.caption))
            yield sample

    def sheet(self) -> Image.Image:
        """Lay them out by size, the commonest first; where there are too many, the same number of each size."""
        sizes = sorted(self._kept, key=lambda size: -len(self._kept[size]))[:_SHOWN]
        most = _SHOWN // len(sizes)
        room = _SHOWN - sum(min(most, len(self._kept[size])) for size in sizes)
        images, captions = [], []
        for size in sizes:
            extra = min(room, max(0, len(self._kept[size]) - most))
            room -= extra
            for image, caption in self._kept[size][: most + extra]:
                images.append(image)
                captions.append((f"{size[0]} x {size[1]}", caption))
        return captioned_grid(images, captions, columns=_COLUMNS, cell=_CELL)

    def _picture(self, sample: Sample) -> Image.Image:
        pixels = (sample.pixels.permute(1, 2, 0).numpy() + 1) * 127.5
        if sample.mask is not None:
            weights = np.maximum(sample.mask[0].numpy(), self._unmasked_weight)[..., None]
            # Towards grey, which pictures have less of than of black and white.
            pixels = pixels * weights + 128 * (1 - weights)
        picture = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
        picture.thumbnail((_CELL, _CELL), Image.Resampling.LANCZOS)
        return picture
