"""Operations that the stages of side networks share."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from ..base import init_linear

TIME_WIDTH = 64
"""Width of the projected time embedding that the stages read."""


def normalize(x: torch.Tensor) -> torch.Tensor:
    """Normalize each feature map to zero mean and unit variance; the scales of taps differ by orders of magnitude."""
    return F.group_norm(x, 1)


def resample(x: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Resize a feature map without parameters: average pooling when shrinking, nearest neighbor when enlarging."""
    if x.shape[-2:] == size:
        return x
    if size[-1] < x.shape[-1]:
        return F.adaptive_avg_pool2d(x, (size[0], size[1]))
    return F.interpolate(x, size=size, mode="nearest")


def modulate(x: torch.Tensor, film: nn.Linear | None, time: torch.Tensor | None) -> torch.Tensor:
    """Scale and shift the channels depending on the timestep, if the base has one."""
    if film is None:
        return x
    scale, shift = film(time)[:, :, None, None].chunk(2, dim=1)
    return x * (1 + scale) + shift


def init_layers(layers: Iterable[nn.Module], generator: torch.Generator | None) -> None:
    """Initialize layers randomly; the zero-initialized gate behind the side network makes the residual zero."""
    for layer in layers:
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        init_linear(layer, generator)
