"""Attention of the base's queries to trained tokens, separately or in one softmax with the base's keys."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from ..utils.autocast import as_input
from .base import Operation

Gate: TypeAlias = Literal["exact", "scale"]
Scale: TypeAlias = Literal["scalar", "channel"]
_HEAD_STEP = 8


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


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return attention `(batch, heads, queries, head width)` in a form that CUDA's fused kernels take.

    They need a head width that is a multiple of eight, or of four in fp32. Others, such as the two or one of a narrow
    tuner, would take the kernel that stores all scores. Zeros fill the heads up; they change no score and no result.

    Args:
        query: `(batch, heads, queries, head width)`.
        key: `(batch, heads, keys, head width)`.
        value: `(batch, heads, keys, head width)`.
        mask: added to the scores; broadcastable to `(batch, heads, queries, keys)`.
    """
    width, outputs = query.shape[-1], value.shape[-1]
    query, key, value = map(_filled, (query, key, value))
    if mask is not None:
        mask = mask.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, mask, scale=width**-0.5)[..., :outputs]


def _filled(x: torch.Tensor) -> torch.Tensor:
    """Fill the head width up with zeros to the next multiple of `_HEAD_STEP`."""
    missing = -x.shape[-1] % _HEAD_STEP
    return F.pad(x, (0, missing)) if missing else x


def attend_to_tokens(
    x: torch.Tensor, operation: Operation, key: torch.Tensor, value: torch.Tensor, gate: Gate
) -> torch.Tensor:
    """Return the residual of attention from the base's queries to trained tokens.

    With the gate "scale": `W_o Attn(Q, K', V')`. With "exact": `W_o (Attn(Q, [K'; K], [V'; V]) - Attn(Q, K, V))`,
    computed as `W_o lam (Attn(Q, K', V') - Attn(Q, K, V))`, `lam = sigmoid(LSE(Q K'^T) - LSE(Q K^T))` for each head
    and query. Among many frozen keys `lam` is small, and in half precision the first form loses the residual to the
    rounding of its two large terms.

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
    query = as_input(frozen.query(x), dtype)
    key, value = (part.to(query.dtype).expand(x.shape[0], -1, -1, -1) for part in (key, value))
    added = attend(query, key, value)
    if gate == "exact":
        source = x if operation.context is None else operation.context
        frozen_key, frozen_value = (as_input(project(source), dtype) for project in (frozen.key, frozen.value))
        share = _share(query, key, frozen_key, operation.mask)
        added = share * (added - attend(query, frozen_key, frozen_value, operation.mask))
    return as_input(frozen.output(join_heads(added).to(x.dtype)), dtype)


def _share(
    query: torch.Tensor, key: torch.Tensor, frozen_key: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Return the share of the trained keys in a softmax with the frozen ones, `(batch, heads, queries, 1)`.

    It is attention over all keys, with the value 1 for the trained and 0 for the frozen ones. So no score matrix is
    stored, and gradients flow to queries and keys.
    """
    if mask is not None:
        mask = F.pad(mask.expand(*mask.shape[:-1], frozen_key.shape[2]), (key.shape[2], 0))
    # As wide as the keys, because flash attention takes no other width.
    values = torch.cat([torch.ones_like(key), torch.zeros_like(frozen_key)], dim=2)
    return attend(query, torch.cat([key, frozen_key], dim=2), values, mask)[..., :1]
