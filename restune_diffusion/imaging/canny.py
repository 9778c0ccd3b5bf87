"""Canny edge detector (Canny 1986) on NumPy arrays, with OpenCV's conventions.

OpenCV and scikit-image are larger than all dependencies of this package except torch, so it is implemented here.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]

_TAN_22_5 = math.sqrt(2) - 1
_TAN_67_5 = math.sqrt(2) + 1
_NEIGHBORS = np.array([(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)])


def canny_edges(pixels: npt.NDArray[np.uint8], low: float, high: float) -> Mask:
    """Detect edges one pixel wide.

    Args:
        pixels: uint8 array `(height, width, channels)`.
        low: lower hysteresis threshold on the gradient `|dx| + |dy|` of a 3x3 Sobel filter: edges continue above it.
        high: upper hysteresis threshold: edges start above it.

    Returns:
        Boolean array `(height, width)`, true on edges.
    """
    across, down = _gradient(pixels.astype(np.int32))
    strength = np.abs(across) + np.abs(down)
    ridges = _is_ridge(across, down, strength) & (strength > low)
    return _connected(ridges, ridges & (strength > high))


def _gradient(pixels: Array) -> tuple[Array, Array]:
    """Return the Sobel derivatives along x and y, at each pixel those of the channel with the largest gradient."""
    p = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = p[:-2] + 2 * p[1:-1] + p[2:]
    columns = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]
    across, down = rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]
    strongest = (np.abs(across) + np.abs(down)).argmax(-1)[..., None]
    return np.take_along_axis(across, strongest, -1)[..., 0], np.take_along_axis(down, strongest, -1)[..., 0]


def _is_ridge(across: Array, down: Array, strength: Array) -> Mask:
    """Return where the gradient is larger than at both neighbors in its direction, rounded to 45 degrees."""
    padded = np.pad(strength, 1)
    height, width = strength.shape

    def at(y: int, x: int) -> Array:
        return padded[1 + y : 1 + y + height, 1 + x : 1 + x + width]

    x, y = np.abs(across), np.abs(down)
    falling = (across < 0) == (down < 0)
    horizontal = (strength > at(0, -1)) & (strength >= at(0, 1))
    vertical = (strength > at(-1, 0)) & (strength >= at(1, 0))
    diagonal = np.where(
        falling,
        (strength > at(-1, -1)) & (strength > at(1, 1)),
        (strength > at(-1, 1)) & (strength > at(1, -1)),
    )
    return np.where(y < _TAN_22_5 * x, horizontal, np.where(y > _TAN_67_5 * x, vertical, diagonal))


def _connected(candidates: Mask, seeds: Mask) -> Mask:
    """Return the candidates that are connected to a seed through neighboring candidates."""
    left, found = np.pad(candidates & ~seeds, 1), np.pad(seeds, 1)
    frontier = np.argwhere(found)
    while len(frontier):
        around = np.unique((frontier[:, None] + _NEIGHBORS).reshape(-1, 2), axis=0)
        frontier = around[left[around[:, 0], around[:, 1]]]
        left[frontier[:, 0], frontier[:, 1]] = False
        found[frontier[:, 0], frontier[:, 1]] = True
    return found[1:-1, 1:-1]
