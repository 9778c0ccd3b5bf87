"""Res-LoRA: a low-rank product in parallel to a linear layer (LoRA, arXiv 2106.09685, as Res-Tuning unbinds it)."""

from __future__ import annotations

import math

import torch
from torch import nn


class ResLora(nn.Module):
    """`(alpha / width) * B (A x)` without biases, `B` zero at the start: the only kind that merges into the weights.

    Args:
        in_channels: input width of the linear layer.
        out_channels: its output width.
        width: the rank.
        alpha: numerator of the fixed factor; None makes the factor one.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int, alpha: float | None = None) -> None:
        super().__init__()
        self.down = nn.Linear(in_channels, width, bias=False)
        self.up = nn.Linear(width, out_channels, bias=False)
        self.factor = 1.0 if alpha is None else alpha / width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map the layer's input `(..., in_channels)` to `(..., out_channels)`, in the tuner's dtype."""
        return self.factor * self.up(self.down(x.to(self.down.weight.dtype)))

    @torch.no_grad()
    def delta(self) -> torch.Tensor:
        """What the residual adds to the layer's weight: `(out_channels, in_channels)`, fp32 or wider."""
        dtype = torch.promote_types(self.up.weight.dtype, torch.float32)
        return self.factor * (self.up.weight.to(dtype) @ self.down.weight.to(dtype))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw `A` as LoRA does, zero `B`."""
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.up.weight)
