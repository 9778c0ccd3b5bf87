"""Res-Attn: low-rank attention in parallel to an operation (Mao & Jiang, arXiv 2312.16916; reconstructed)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..utils.autocast import as_input
from .base import Operation
from .gate import Scale, attend, join_heads, learned_scale, split_heads


class ResAttention(nn.Module):
    """Attention `scale * Attn(x A_q, k A_k, k A_v) B_o`; at the start, `B_o` is zero and the scale is one.

    Args:
        channels: width of the operation's input and output.
        key_channels: input width of the key and value layers; for cross-attention, the width of the text states.
        width: inner width, over all heads.
        heads: number of attention heads; divides `width`.
        scale: one learned factor, or one per channel.
    """

    def __init__(self, channels: int, key_channels: int, width: int, heads: int, scale: Scale = "scalar") -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, width, bias=False)
        self.to_k = nn.Linear(key_channels, width, bias=False)
        self.to_v = nn.Linear(key_channels, width, bias=False)
        self.to_out = nn.Linear(width, channels, bias=False)
        self.scale = learned_scale(scale, channels)

    def forward(self, x: torch.Tensor, operation: Operation) -> torch.Tensor:
        """Map the operation's input `(batch, tokens, channels)` to a residual of its shape, in the tuner's dtype.

        Keys and values are computed from the operation's context, if it has one. The operation's mask applies.
        """
        dtype = self.scale.dtype
        x = as_input(x, dtype)
        source = x if operation.context is None else as_input(operation.context, dtype)
        query, key, value = (
            split_heads(layer(read), self.heads)
            for layer, read in ((self.to_q, x), (self.to_k, source), (self.to_v, source))
        )
        return self.scale * self.to_out(join_heads(attend(query, key, value, operation.mask)))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize the input layers randomly, the output layer with zeros and the scale with ones."""
        for layer in (self.to_q, self.to_k, self.to_v):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.to_out.weight)
        nn.init.ones_(self.scale)


class PlainAttention(ResAttention):
    """Attention in parallel to an operation that is not attention: its normalized input attends to itself."""

    def forward(self, x: torch.Tensor, operation: Operation) -> torch.Tensor:
        """Map the operation's input `(batch, tokens, channels)` to a residual of its shape, in the tuner's dtype."""
        return super().forward(F.layer_norm(as_input(x, self.scale.dtype), x.shape[-1:]), Operation())
