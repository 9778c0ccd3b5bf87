"""Condition encoder of CSC-Tuner: a cascade from an image to every skip connection (SCEdit, arXiv 2312.11392)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ..backbones import Site
from .base import init_zero
from .configs import ControlConfig

# Width and stride of the convolutions of the stem before the last, as published.
_STEM = ((16, 1), (16, 1), (32, 2), (32, 1), (96, 2), (96, 1))
STEM_STRIDE = 8
"""Pixels of a condition image per position of the latent, along each side."""
# 1 / E[SiLU(z)^2] for standard normal z: a weight variance of this over the fan-in preserves the scale of a signal.
_SILU_GAIN = 2.81


class CascadeEncoder(nn.Module):
    """A stem of 3x3 convolutions with SiLU, then for each skip connection SiLU and a zero-initialised convolution.

    Each level reads the previous one. In the published encoder, the input of the next level is the output of the zero
    convolution, so that twelve zero factors lie in series between the image and the deepest skip, and the levels start
    to learn slowly, one after the other. Here, it is the sum of that output and the level's own input, resized without
    parameters (average pooling, and channels truncated or padded with zeros, as in option A of the ResNet shortcuts).
    The features that enter the base are still zero at the start, and the number of parameters is the same, but every
    convolution receives the image from the first step.

    Args:
        sites: skip connections, from shallow to deep.
        config: settings of the part.
    """

    def __init__(self, sites: Mapping[str, Site], config: ControlConfig) -> None:
        super().__init__()
        self.stem = nn.ModuleList()
        width = config.channels
        stem = [(max(1, int(channels * config.stem_ratio)), stride) for channels, stride in _STEM]
        for channels, stride in (*stem, (config.stem_channels, 2)):
            self.stem.append(nn.Conv2d(width, channels, 3, stride=stride, padding=1))
            width = channels
        self.levels = nn.ModuleList()
        stride, kernel = 1, config.level_kernel
        for site in sites.values():
            step = max(1, site.stride // stride)
            self.levels.append(nn.Conv2d(width, site.channels, kernel, stride=step, padding=kernel // 2))
            width, stride = site.channels, site.stride
        self._sites = tuple(sites)
        self._shortcut = config.shortcut

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode condition images `(n, channels, height, width)`, `STEM_STRIDE` times as high and wide as the latent.

        Returns:
            A feature for each skip connection, with its width and resolution; zero at the start.
        """
        state = image
        for number, layer in enumerate(self.stem):
            state = layer(F.silu(state) if number else state)
        features = {}
        for site, layer in zip(self._sites, self.levels, strict=True):
            features[site] = feature = layer(F.silu(state))
            state = feature + _shortcut(state, feature) if self._shortcut else feature
        return features

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize the stem so that it preserves the scale of the signal, and the levels with zeros."""
        for layer in self.stem:
            assert isinstance(layer, nn.Conv2d)
            assert layer.bias is not None
            std = (_SILU_GAIN / layer.weight[0].numel()) ** 0.5
            nn.init.normal_(layer.weight, std=std, generator=generator)
            nn.init.zeros_(layer.bias)
        for layer in self.levels:
            assert isinstance(layer, nn.Conv2d)
            init_zero(layer)


def _shortcut(state: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Resize a state to the width and resolution of another without parameters."""
    if state.shape[-2:] != like.shape[-2:]:
        state = F.adaptive_avg_pool2d(state, (like.shape[-2], like.shape[-1]))
    missing = like.shape[1] - state.shape[1]
    return F.pad(state, (0, 0, 0, 0, 0, missing)) if missing >= 0 else state[:, : like.shape[1]]
