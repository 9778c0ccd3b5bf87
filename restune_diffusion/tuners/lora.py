"""Res-LoRA: a low-rank product in parallel to a linear layer or convolution (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..utils.autocast import as_input


class ResLora(nn.Module):
    """LoRA `(alpha / width) * B (A x)` without biases; `B` is zero-initialized. It can be merged into the weights.

    It is the only type of tuner that can be merged. In parallel to a convolution, `A` is a convolution of the same
    kernel, stride and padding, and `B` one of 1x1 (LoCon).

    Args:
        in_channels: input width of the layer.
        out_channels: output width of the layer.
        width: rank.
        alpha: numerator of the fixed factor; None for a factor of 1.
        convolution: kernel size, stride and padding of a convolution; None for a linear layer.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int,
        alpha: float | None = None,
        convolution: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        self.down: nn.Linear | nn.Conv2d
        self.up: nn.Linear | nn.Conv2d
        if convolution is None:
            self.down = nn.Linear(in_channels, width, bias=False)
            self.up = nn.Linear(width, out_channels, bias=False)
        else:
            self.down = nn.Conv2d(in_channels, width, *convolution, bias=False)
            self.up = nn.Conv2d(width, out_channels, 1, bias=False)
        self.factor = 1.0 if alpha is None else alpha / width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the residual for the layer's input, in the tuner's dtype.

        The input is `(..., in_channels)`, or `(batch, in_channels, height, width)` for a convolution.
        """
        down, up = self.down.weight, self.up.weight
        x = as_input(x, down.dtype)
        # Without the calls of the modules, which cost the host more than the products on a small feature.
        y: torch.Tensor = F.linear(F.linear(x, down), up) if down.dim() == 2 else self.up(self.down(x))
        return y if self.factor == 1 else self.factor * y

    @torch.no_grad()
    def delta(self) -> torch.Tensor:
        """Return the change of the layer's weight, in its shape and in fp32 or wider."""
        dtype = torch.promote_types(self.up.weight.dtype, torch.float32)
        up, down = self.up.weight.flatten(1).to(dtype), self.down.weight.to(dtype)
        return self.factor * (up @ down.flatten(1)).unflatten(1, down.shape[1:])

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize `A` as in LoRA and `B` with zeros."""
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.up.weight)
