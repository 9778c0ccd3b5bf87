"""Res-Adapter: a bottleneck in parallel to an operation (Res-Tuning, arXiv 2310.19859)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..utils.autocast import as_input
from .base import init_linear, init_zero
from .gate import Scale, learned_scale


class ResAdapter(nn.Module):
    """Bottleneck `scale * W_up GELU(W_down x)` per token; at the start, `W_up` and its bias are zero, the scale one.

    Args:
        channels: width of the operation's input and output.
        width: width of the bottleneck.
        scale: one learned factor, or one per channel.
    """

    def __init__(self, channels: int, width: int, scale: Scale = "scalar") -> None:
        super().__init__()
        self.down = nn.Linear(channels, width)
        self.up = nn.Linear(width, channels)
        self.scale = learned_scale(scale, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(batch, tokens, channels)` to a residual of the same shape, in the tuner's dtype."""
        return self.scale * self.up(F.gelu(self.down(as_input(x, self.scale.dtype))))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize `W_down` randomly, `W_up` with zeros and the scale with ones."""
        init_linear(self.down, generator)
        init_zero(self.up)
        nn.init.ones_(self.scale)
