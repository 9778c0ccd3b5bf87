"""Res-LoRA: a low-rank product in parallel to a linear layer (LoRA, arXiv 2106.09685, as Res-Tuning unbinds it)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class ResLora(nn.Module):
    """LoRA `(alpha / width) * B (A x)` without biases; `B` is zero-initialized. It can be merged into the weights.

    It is the only type of tuner that can be merged.

    Args:
        in_channels: input width of the linear layer.
        out_channels: output width of the linear layer.
        width: rank.
        alpha: numerator of the fixed factor; None for a factor of 1.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int, alpha: float | None = None) -> None:
        super().__init__()
        self.down = nn.Linear(in_channels, width, bias=False)
        self.up = nn.Linear(width, out_channels, bias=False)
        self.factor = 1.0 if alpha is None else alpha / width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map the layer's input `(..., in_channels)` to `(..., out_channels)`, in the tuner's dtype."""
        # Without the calls of the modules, which cost the host more than the products on a small feature.
        down, up = self.down.weight, self.up.weight
        y = F.linear(F.linear(x.to(down.dtype), down), up)
        return y if self.factor == 1 else self.factor * y

    @torch.no_grad()
    def delta(self) -> torch.Tensor:
        """Return the change of the layer's weight, `(out_channels, in_channels)` in fp32 or wider."""
        dtype = torch.promote_types(self.up.weight.dtype, torch.float32)
        return self.factor * (self.up.weight.to(dtype) @ self.down.weight.to(dtype))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize `A` as in LoRA and `B` with zeros."""
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.up.weight)
