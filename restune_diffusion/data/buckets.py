"""Aspect ratio bucketing: training sizes of about one area in several shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

Size: TypeAlias = tuple[int, int]
"""Width and height in pixels."""


class Buckets:
    """Assignment of each image to a bucket size.

    Args:
        sizes: bucket sizes; at least one.
        grid: step in pixels for images smaller than their bucket. Such an image keeps its own size, floored to a
            multiple of this step. Without it such images are enlarged to their bucket.
        max_aspect_ratio: largest ratio of long to short side for images that keep their own size.
    """

    def __init__(self, sizes: Sequence[Size], grid: int | None = None, max_aspect_ratio: float = math.inf) -> None:
        # Among equally near shapes the largest size wins.
        self.sizes = sorted(sizes, key=lambda size: -size[0] * size[1])
        self._grid = grid
        self._max_aspect_ratio = max_aspect_ratio

    def choose(self, original: Size) -> Size:
        """Return the bucket size nearest in shape to an image, by the logarithm of width over height."""
        width, height = original
        nearest = min(self.sizes, key=lambda size: abs(math.log(size[0] * height / (size[1] * width))))
        if self._grid is None or (width >= nearest[0] and height >= nearest[1]):
            return nearest
        longest = self._max_aspect_ratio
        sides = min(width, height * longest, nearest[0]), min(height, width * longest, nearest[1])
        return _floored(sides[0], self._grid), _floored(sides[1], self._grid)


def bucket_sizes(resolution: int, step: int, max_aspect_ratio: float) -> list[Size]:
    """List the bucket sizes of at most the area of a square: for each width the largest height, in both orientations.

    Args:
        resolution: side of the square in pixels; the square itself is always in the list.
        step: sides are multiples of this number of pixels.
        max_aspect_ratio: largest ratio of long to short side.
    """
    sizes = {(resolution, resolution)}
    for width in range(step, int(resolution * math.sqrt(max_aspect_ratio)) + step, step):
        height = resolution**2 // width // step * step
        if height and max(width, height) <= max_aspect_ratio * min(width, height):
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def bucket_step(pipeline: Any) -> int:
    """Return the step of bucket sizes for a base: a multiple of eight latent pixels that its U-Net halves evenly."""
    scale = pipeline.vae_scale_factor
    return math.lcm(8 * scale, scale * 2 ** (len(pipeline.unet.config.block_out_channels) - 1))


def _floored(side: float, grid: int) -> int:
    return max(grid, int(side) // grid * grid)
