"""Attention of the base's queries to trained tokens, separately or in one softmax with the base's keys."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from .base import Operation

Gate: TypeAlias = Literal["exact", "scale"]
Scale: TypeAlias = Literal["scalar", "channel"]


def learned_scale(scale: Scale, channels: int) -> nn.Parameter:
    """Return the learned factor on a residual `(batch, tokens, channels)`: one number or one per channel."""
    return nn.Parameter(torch.zeros(() if scale == "scalar" else (channels,)))


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Reshape `(batch, tokens, width)` to `(batch, heads, tokens, width / heads)`."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: torch.Tensor) -> torch.Tensor:
    """Reshape `(batch, heads, tokens, head width)` to `(batch, tokens, heads * head width)`."""
    return x.transpose(1, 2).flatten(2)


def most_heads(width: int, heads: int) -> int:
    """Return the largest number of heads, at most `heads`, that divides a width."""
    return max(count for count in range(1, heads + 1) if width % count == 0)


def attend_to_tokens(
    x: torch.Tensor, operation: Operation, key: torch.Tensor, value: torch.Tensor, gate: Gate
) -> torch.Tensor:
    """Return the residual of attention from the base's queries to trained tokens.

    With the gate "scale": `W_o Attn(Q, K', V')`. With "exact": `W_o (Attn(Q, [K'; K], [V'; V]) - Attn(Q, K, V))`,
    which is `W_o lam (Attn(Q, K', V') - Attn(Q, K, V))`, `lam = sigmoid(LSE(Q K'^T) - LSE(Q K^T))` for each head and
    query. It is computed with two calls of attention, so that no score matrix is stored.

    Args:
        x: the operation's input `(batch, tokens, channels)`, in the base's dtype.
        operation: attention, with its frozen projections; its mask covers the frozen keys alone.
        key: trained keys `(1, heads, length, head width)`, in the tuner's dtype.
        value: trained values `(1, heads, length, head width)`, in the tuner's dtype.
        gate: whether the trained keys share the softmax with the frozen ones.

    Returns:
        `(batch, tokens, channels)` in the tuner's dtype.
    """
    frozen = operation.attention
    assert frozen is not None, "a tuner in parallel to attention needs the frozen projections"
    dtype = key.dtype
    query = frozen.query(x).to(dtype)
    key, value = (part.expand(x.shape[0], -1, -1, -1) for part in (key, value))
    if gate == "exact":
        source = x if operation.context is None else operation.context
        added = _exact(query, key, value, frozen.key(source).to(dtype), frozen.value(source).to(dtype), operation.mask)
    else:
        added = F.scaled_dot_product_attention(query, key, value)
    return frozen.output(join_heads(added).to(x.dtype)).to(dtype)


def _exact(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    frozen_key: torch.Tensor,
    frozen_value: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    padded = None
    if mask is not None:
        mask = mask.to(query.dtype).expand(*mask.shape[:-1], frozen_key.shape[2])
        padded = F.pad(mask, (key.shape[2], 0))
    together = F.scaled_dot_product_attention(
        query, torch.cat([key, frozen_key], dim=2), torch.cat([value, frozen_value], dim=2), padded
    )
    return together - F.scaled_dot_product_attention(query, frozen_key, frozen_value, mask)
