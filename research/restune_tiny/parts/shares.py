"""Color histograms of images."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor


def colour_shares(images: Tensor, levels: int) -> Tensor:
    """Return the share of each color in images: N x 3 x H x W in [0, 1] to N x levels^3, each row summing to 1.

    Each pixel is distributed over the eight nearest grid colors with trilinear weights, which makes the shares
    differentiable.
    """
    place = images.flatten(2).clamp(0, 1) * (levels - 1)
    corner = place.detach().floor().clamp(max=levels - 2)
    upper = place - corner
    counts = images.new_zeros(len(images), levels**3)
    for step in product((0, 1), repeat=3):
        chosen = torch.tensor(step)[None, :, None]
        share = torch.where(chosen == 1, upper, 1 - upper).prod(1)
        red, green, blue = (corner.long() + chosen).unbind(1)
        counts = counts.scatter_add(1, (red * levels + green) * levels + blue, share)
    return counts / place.shape[2]
