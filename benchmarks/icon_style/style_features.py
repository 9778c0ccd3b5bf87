"""What tells one artist's pictures from another's, whatever they show: the palette and the texture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from research.restune_tiny.parts.shares import colour_shares
from restune_diffusion.evaluation import Lpips

LEVELS = 7
"""Shades of each channel in the palette."""


class StyleFeatures(nn.Module):
    """Palette and texture of pictures, N x 3 x 64 x 64 in [0, 1]: N x `size` in float32.

    The texture is the mean and the spread over all places of what AlexNet's first four convolutions find (such
    statistics are what style transfer calls style: Huang and Belongie 2017, arXiv 1703.06868, section 5) in the
    picture at twice its size, where the first convolution, made for 224 px, sees strokes. Square roots even out the
    few large values of both.
    """

    size = LEVELS**3 + 2 * (64 + 192 + 384 + 256)

    def __init__(self) -> None:
        super().__init__()
        self.network = Lpips()

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """Return the features."""
        large = F.interpolate(pictures, scale_factor=2, mode="bilinear", align_corners=False)
        found = [colour_shares(pictures.float(), LEVELS)]
        for level in self.network.features(large)[:4]:
            found += [level.mean((2, 3)), level.flatten(2).std(2)]
        return torch.cat(found, 1).sqrt()
