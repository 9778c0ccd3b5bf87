"""What tells one artist's pictures from another's, whatever they show: the palette and the texture."""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restune_diffusion.evaluation import Lpips


def palette(pictures: Tensor, levels: int = 7) -> Tensor:
    """Share of each colour in pictures, N x 3 x H x W in [0, 1]: N x levels^3 in float32, each row summing to 1.

    A pixel counts for the eight colours of the grid around its own, by how near it is to each (trilinear).
    """
    place = pictures.float().flatten(2).clamp(0, 1) * (levels - 1)
    corner = place.floor().clamp(max=levels - 2)
    upper = place - corner
    counts = torch.zeros(len(pictures), levels**3)
    for step in product((0, 1), repeat=3):
        chosen = torch.tensor(step)[None, :, None]
        share = torch.where(chosen == 1, upper, 1 - upper).prod(1)
        red, green, blue = (corner.long() + chosen).unbind(1)
        counts.scatter_add_(1, (red * levels + green) * levels + blue, share)
    return counts / place.shape[2]


class StyleFeatures(nn.Module):
    """Palette and texture of pictures, N x 3 x 64 x 64 in [0, 1]: N x `size` in float32.

    The texture is the mean and the spread over all places of what AlexNet's first four convolutions find (such
    statistics are what style transfer calls style: Huang and Belongie 2017, arXiv 1703.06868, section 5) in the
    picture at twice its size, where the first convolution, made for 224 px, sees strokes. Square roots even out the
    few large values of both.
    """

    size = 343 + 2 * (64 + 192 + 384 + 256)

    def __init__(self) -> None:
        super().__init__()
        self.network = Lpips()

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """Return the features."""
        large = F.interpolate(pictures, scale_factor=2, mode="bilinear", align_corners=False)
        found = [palette(pictures)]
        for level in self.network.features(large)[:4]:
            found += [level.mean((2, 3)), level.flatten(2).std(2)]
        return torch.cat(found, 1).sqrt()
