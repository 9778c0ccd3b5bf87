"""Res-Prompt: trained tokens that an operation's input attends to (Res-Tuning, arXiv 2310.19859).

As Res-Prefix with `K' = T W_k` and `V' = T W_v`, `T` trained and `W` the base's own. It is what prompt tokens that
are replaced at every layer (VPT-deep) do to the other tokens; the rows of the prompt tokens themselves are dropped.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .base import Operation
from .gate import Gate, Scale, attend_to_tokens, join_heads, learned_scale, split_heads


class _Prompt(nn.Module):
    """Trained tokens `(length, width)`, and a factor that is zero at the start."""

    def __init__(self, channels: int, width: int, length: int, scale: Scale) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(length, width))
        self.scale = learned_scale(scale, channels)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw tokens of unit variance, as a layer norm leaves those that they stand beside; close the gate."""
        nn.init.normal_(self.tokens, generator=generator)
        nn.init.zeros_(self.scale)


class AttentionPrompt(_Prompt):
    """Beside attention: the base's own projections make keys and values of trained tokens.

    Args:
        channels: width of the operation's output.
        width: width of what the frozen key layer reads: the text states' for cross-attention.
        length: number of trained tokens.
        gate: whether they share the softmax with the frozen keys.
        scale: one learned factor, or one for each channel.
    """

    def __init__(self, channels: int, width: int, length: int, gate: Gate = "scale", scale: Scale = "scalar") -> None:
        super().__init__(channels, width, length, scale)
        self.gate = gate

    def forward(self, x: torch.Tensor, operation: Operation) -> torch.Tensor:
        """Map the operation's input `(batch, tokens, channels)` to its residual, in the tuner's dtype."""
        frozen = operation.attention
        assert frozen is not None, "a tuner beside attention needs the frozen projections"
        tokens, dtype = self.tokens[None].to(x.dtype), self.scale.dtype
        key, value = frozen.key(tokens).to(dtype), frozen.value(tokens).to(dtype)
        return self.scale * attend_to_tokens(x, operation, key, value, self.gate)


class PlainPrompt(_Prompt):
    """Beside an operation without projections of its own: the same tokens are keys and values of the normalised input.

    Args:
        channels: width of the operation's input and output.
        heads: attention heads; they divide `channels`.
        length: number of trained tokens.
        scale: one learned factor, or one for each channel.
    """

    def __init__(self, channels: int, heads: int, length: int, scale: Scale = "scalar") -> None:
        super().__init__(channels, channels, length, scale)
        self.heads = heads

    def forward(self, x: torch.Tensor, operation: Operation) -> torch.Tensor:
        """Map the operation's input `(batch, tokens, channels)` to a residual of its shape, in the tuner's dtype."""
        query = split_heads(F.layer_norm(x.to(self.scale.dtype), x.shape[-1:]), self.heads)
        tokens = split_heads(self.tokens[None], self.heads).expand(x.shape[0], -1, -1, -1)
        return self.scale * join_heads(F.scaled_dot_product_attention(query, tokens, tokens))
