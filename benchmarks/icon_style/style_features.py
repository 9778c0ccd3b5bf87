"""Style features that do not depend on the content: palette and texture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from research.restune_tiny.parts.shares import colour_shares
from restune_diffusion.evaluation import Lpips

LEVELS = 7
"""Palette levels per color channel."""


class StyleFeatures(nn.Module):
    """Palette and texture features of images: N x 3 x 64 x 64 in [0, 1] to N x `size` in float32.

    The texture features are the spatial mean and standard deviation of AlexNet's first four convolutions, the style
    statistics of style transfer (Huang and Belongie 2017, arXiv 1703.06868, section 5). Images are upscaled by two,
    because the first convolution is made for 224 px. A square root reduces the few large values of both.
    """

    size = LEVELS**3 + 2 * (64 + 192 + 384 + 256)

    def __init__(self) -> None:
        super().__init__()
        self.network = Lpips()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the features."""
        large = F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
        found = [colour_shares(images.float(), LEVELS)]
        for level in self.network.features(large)[:4]:
            found += [level.mean((2, 3)), level.flatten(2).std(2)]
        return torch.cat(found, 1).sqrt()
