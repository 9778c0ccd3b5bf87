"""Res-Prefix: attention of an operation's input to trained keys and values (Res-Tuning, arXiv 2310.19859).

Prefix tuning prepends trained keys and values to those of attention. In parallel form:

    Attn(Q, [K'; K], [V'; V]) = (1 - lam) Attn(Q, K, V) + lam Attn(Q, K', V')

`lam` comes from the shared softmax (gate "exact"). The paper's figure has a learned factor instead of `lam`, and no
factor on the frozen term (gate "scale"). A softmax over one key is one, so the key of a prefix of length one has no
effect with the gate "scale".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..utils.autocast import as_input
from .base import Operation
from .gate import Gate, Scale, attend, attend_to_tokens, join_heads, learned_scale, split_heads


class _Tokens(nn.Module):
    """Trained keys and values `(length, heads, head width)` and a zero-initialized factor."""

    def __init__(self, channels: int, heads: int, key_width: int, value_width: int, length: int, scale: Scale) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.zeros(length, heads, key_width))
        self.value = nn.Parameter(torch.zeros(length, heads, value_width))
        self.scale = learned_scale(scale, channels)

    def keys_and_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values in the layout of attention, `(1, heads, length, head width)`."""
        return self.key.transpose(0, 1)[None], self.value.transpose(0, 1)[None]

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize keys and values with unit variance, about that of the frozen ones, and set the factor to zero."""
        nn.init.normal_(self.key, generator=generator)
        nn.init.normal_(self.value, generator=generator)
        nn.init.zeros_(self.scale)


class AttentionPrefix(_Tokens):
    """Prefix in parallel to attention: the base's queries attend to trained keys and values.

    Args:
        channels: width of the operation's output.
        heads: number of attention heads of the operation.
        key_width: width of the keys of one head.
        value_width: width of the values of one head.
        length: number of trained tokens.
        gate: `exact` if the trained tokens share the softmax with the frozen keys, otherwise `scale`.
        scale: one learned factor, or one per channel.
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
    """Prefix in parallel to an operation without keys: the normalized input is the query, without an output layer.

    Args:
        channels: width of the operation's input and output.
        heads: number of attention heads; divides `channels`.
        length: number of trained tokens.
        scale: one learned factor, or one per channel.
    """

    def __init__(self, channels: int, heads: int, length: int, scale: Scale = "scalar") -> None:
        super().__init__(channels, heads, channels // heads, channels // heads, length, scale)

    def forward(self, x: torch.Tensor, operation: Operation) -> torch.Tensor:
        """Map the operation's input `(batch, tokens, channels)` to a residual of its shape, in the tuner's dtype."""
        key, value = (part.expand(x.shape[0], -1, -1, -1) for part in self.keys_and_values())
        query = split_heads(F.layer_norm(as_input(x, self.scale.dtype), x.shape[-1:]), key.shape[1])
        return self.scale * join_heads(attend(query, key, value))
