"""Res-Attn: low-rank attention in parallel to an operation (Mao & Jiang, arXiv 2312.16916; reconstructed)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .base import Operation
from .gate import Scale, join_heads, learned_scale, split_heads


class ResAttention(nn.Module):
    """`scale * Attn(x A_q, k A_k, k A_v) B_o`, `B_o` zero at the start, the scale is one.

    Args:
        channels: width of the operation's input and output.
        key_channels: width of what keys and values are read from: the text states' for cross-attention.
        width: inner width, over all heads.
        heads: attention heads; they divide `width`.
        scale: one learned factor, or one for each channel.
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

        Keys and values are read from the operation's context, where it has one, and its mask holds here too.
        """
        dtype = self.scale.dtype
        x = x.to(dtype)
        source = x if operation.context is None else operation.context.to(dtype)
        query, key, value = (
            split_heads(layer(read), self.heads)
            for layer, read in ((self.to_q, x), (self.to_k, source), (self.to_v, source))
        )
        mask = None if operation.mask is None else operation.mask.to(dtype)
        return self.scale * self.to_out(join_heads(F.scaled_dot_product_attention(query, key, value, mask)))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the input layers, zero the output layer."""
        for layer in (self.to_q, self.to_k, self.to_v):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.to_out.weight)
        nn.init.ones_(self.scale)


class PlainAttention(ResAttention):
    """Beside an operation that is not attention: the normalised tokens of its input attend to each other."""

    def forward(self, x: torch.Tensor, operation: Operation) -> torch.Tensor:
        """Map the operation's input `(batch, tokens, channels)` to a residual of its shape, in the tuner's dtype."""
        return super().forward(F.layer_norm(x.to(self.scale.dtype), x.shape[-1:]), Operation())
