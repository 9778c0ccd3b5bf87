"""Res-Prompt: attention of an operation's input to trained tokens (Res-Tuning, arXiv 2310.19859).

Same as Res-Prefix with `K' = T W_k` and `V' = T W_v`, where `T` is trained and `W` is frozen. It equals the effect on
the other tokens of prompt tokens that are replaced at every layer (VPT-deep); the outputs at the prompt tokens
themselves are dropped.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..utils.autocast import as_input
from .base import Operation
from .gate import Gate, Scale, attend, attend_to_tokens, join_heads, learned_scale, split_heads


class _Prompt(nn.Module):
    """Trained tokens `(length, width)` and a zero-initialized factor."""

    def __init__(self, channels: int, width: int, length: int, scale: Scale) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(length, width))
        self.scale = learned_scale(scale, channels)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize tokens with unit variance, like the layer-normed input tokens, and set the factor to zero."""
        nn.init.normal_(self.tokens, generator=generator)
        nn.init.zeros_(self.scale)


class AttentionPrompt(_Prompt):
    """Prompt in parallel to attention: the base's projections map trained tokens to keys and values.

    Args:
        channels: width of the operation's output.
        width: input width of the frozen key layer; for cross-attention, the width of the text states.
        length: number of trained tokens.
        gate: `exact` if the trained tokens share the softmax with the frozen keys, otherwise `scale`.
        scale: one learned factor, or one per channel.
    """

    def __init__(self, channels: int, width: int, length: int, gate: Gate = "scale", scale: Scale = "scalar") -> None:
        super().__init__(channels, width, length, scale)
        self.gate = gate

    def forward(self, x: torch.Tensor, operation: Operation) -> torch.Tensor:
        """Map the operation's input `(batch, tokens, channels)` to its residual, in the tuner's dtype."""
        frozen = operation.attention
        assert frozen is not None, "a tuner in parallel to attention needs the frozen projections"
        tokens, dtype = self.tokens[None].to(x.dtype), self.scale.dtype
        key, value = as_input(frozen.key(tokens), dtype), as_input(frozen.value(tokens), dtype)
        return self.scale * attend_to_tokens(x, operation, key, value, self.gate)


class PlainPrompt(_Prompt):
    """Prompt in parallel to an operation without projections: the normalized input attends to the tokens.

    The tokens are both keys and values.

    Args:
        channels: width of the operation's input and output.
        heads: number of attention heads; divides `channels`.
        length: number of trained tokens.
        scale: one learned factor, or one per channel.
    """

    def __init__(self, channels: int, heads: int, length: int, scale: Scale = "scalar") -> None:
        super().__init__(channels, channels, length, scale)
        self.heads = heads

    def forward(self, x: torch.Tensor, operation: Operation) -> torch.Tensor:
        """Map the operation's input `(batch, tokens, channels)` to a residual of its shape, in the tuner's dtype."""
        query = split_heads(F.layer_norm(as_input(x, self.scale.dtype), x.shape[-1:]), self.heads)
        tokens = split_heads(self.tokens[None], self.heads).expand(x.shape[0], -1, -1, -1)
        return self.scale * join_heads(attend(query, tokens, tokens))
