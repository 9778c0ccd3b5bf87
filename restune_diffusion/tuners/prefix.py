"""Res-Prefix: trained keys and values that an operation's input attends to (Res-Tuning, arXiv 2310.19859).

Prefix tuning puts trained keys and values before those of attention. In parallel form that is

    Attn(Q, [K'; K], [V'; V]) = (1 - lam) Attn(Q, K, V) + lam Attn(Q, K', V')

with `lam` from the softmax that both share (the gate "exact"); the paper's drawing has a learned factor in its place
and leaves the frozen term alone (the gate "scale"). A softmax over one key is one, so that with this gate the key of
a prefix of length one does nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .base import Operation
from .gate import Gate, Scale, attend_to_tokens, join_heads, learned_scale, split_heads


class _Tokens(nn.Module):
    """Trained keys and values `(length, heads, head width)`, and a factor that is zero at the start."""

    def __init__(self, channels: int, heads: int, key_width: int, value_width: int, length: int, scale: Scale) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.zeros(length, heads, key_width))
        self.value = nn.Parameter(torch.zeros(length, heads, value_width))
        self.scale = learned_scale(scale, channels)

    def keys_and_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both as attention takes them: `(1, heads, length, head width)`."""
        return self.key.transpose(0, 1)[None], self.value.transpose(0, 1)[None]

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw keys and values with unit variance, about that of what they stand beside; close the gate."""
        nn.init.normal_(self.key, generator=generator)
        nn.init.normal_(self.value, generator=generator)
        nn.init.zeros_(self.scale)


class AttentionPrefix(_Tokens):
    """Beside attention: the base's own queries attend to trained keys and values.

    Args:
        channels: width of the operation's output.
        heads: attention heads of the operation.
        key_width: width of one head's keys.
        value_width: width of one head's values.
        length: number of trained tokens.
        gate: whether they share the softmax with the frozen keys.
        scale: one learned factor, or one for each channel.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        key_width: int,
        value_width: int,
        length: int,
        gate: Gate = "scale",
        scale: Scale = "scalar",
    ) -> None:
        super().__init__(channels, heads, key_width, value_width, length, scale)
        self.gate = gate

    def forward(self, x: torch.Tensor, operation: Operation) -> torch.Tensor:
        """Map the operation's input `(batch, tokens, channels)` to its residual, in the tuner's dtype."""
        return self.scale * attend_to_tokens(x, operation, *self.keys_and_values(), self.gate)


class PlainPrefix(_Tokens):
    """Beside an operation without keys of its own: the normalised input is the query, and there is no output layer.

    Args:
        channels: width of the operation's input and output.
        heads: attention heads; they divide `channels`.
        length: number of trained tokens.
        scale: one learned factor, or one for each channel.
    """

    def __init__(self, channels: int, heads: int, length: int, scale: Scale = "scalar") -> None:
        super().__init__(channels, heads, channels // heads, channels // heads, length, scale)

    def forward(self, x: torch.Tensor, operation: Operation) -> torch.Tensor:
        """Map the operation's input `(batch, tokens, channels)` to a residual of its shape, in the tuner's dtype."""
        key, value = (part.expand(x.shape[0], -1, -1, -1) for part in self.keys_and_values())
        query = split_heads(F.layer_norm(x.to(self.scale.dtype), x.shape[-1:]), key.shape[1])
        return self.scale * join_heads(F.scaled_dot_product_attention(query, key, value))
