"""Describe a call of a transformer block's operation to the tuners attached to it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from torch import nn

from ..backbones import text_states
from ..tuners import FrozenAttention, Operation

Quiet: TypeAlias = Callable[[], AbstractContextManager[None]]
Map: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


def operation_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the input of an operation from the arguments of its call."""
    x: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return x


def show_operation(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], quiet: Quiet) -> Operation:
    """Return the context, mask and frozen projections of an operation's call, for tuners in parallel to it.

    Args:
        module: attention, feed-forward network or block, of diffusers or of transformers' ViT.
        args: the positional arguments of its call.
        kwargs: the keyword arguments of its call.
        quiet: context manager in which the base's layers run without tuners.
    """
    if hasattr(module, "q_proj"):
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        return Operation(None, _additive(mask), _of_transformers(module, quiet))
    context = text_states(kwargs.get("encoder_hidden_states"))
    if hasattr(module, "to_q"):
        mask = kwargs.get("attention_mask")
        return Operation(context, _for_heads(mask), _of_diffusers(module, context is not None, quiet))
    return Operation(context)


def _for_heads(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Reshape diffusers' mask `(batch, keys)` or `(batch, queries or 1, keys)` to broadcast over attention scores."""
    if mask is None:
        return None
    return mask[:, None, None] if mask.dim() == 2 else mask[:, None]


def _additive(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Convert a boolean mask (true for keys to keep) to an additive mask of the attention scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)


def _of_diffusers(attention: Any, reads_context: bool, quiet: Quiet) -> FrozenAttention:
    """Return the projections of diffusers' `Attention`."""

    def source(x: torch.Tensor) -> torch.Tensor:
        return attention.norm_encoder_hidden_states(x) if reads_context and attention.norm_cross else x

    def key_layer(x: torch.Tensor) -> torch.Tensor:
        return attention.to_k(source(x))

    def value_layer(x: torch.Tensor) -> torch.Tensor:
        return attention.to_v(source(x))

    def output(x: torch.Tensor) -> torch.Tensor:
        return _without_bias(attention.to_out[0], x, quiet) / attention.rescale_output_factor

    return FrozenAttention(
        _split(attention.to_q, attention.heads, attention.norm_q, quiet),
        _split(key_layer, attention.heads, attention.norm_k, quiet),
        _split(value_layer, attention.heads, None, quiet),
        output,
    )


def _of_transformers(attention: Any, quiet: Quiet) -> FrozenAttention:
    """Return the projections of transformers' `ViTAttention`."""
    heads = attention.num_attention_heads

    def output(x: torch.Tensor) -> torch.Tensor:
        return _without_bias(attention.o_proj, x, quiet)

    return FrozenAttention(
        _split(attention.q_proj, heads, None, quiet),
        _split(attention.k_proj, heads, None, quiet),
        _split(attention.v_proj, heads, None, quiet),
        output,
    )


def _split(layer: Map, heads: int, norm: Map | None, quiet: Quiet) -> Map:
    """Return a function that runs a frozen projection, splits its output into heads, and normalizes like the base."""

    def projected(x: torch.Tensor) -> torch.Tensor:
        with quiet():
            x = layer(x)
        x = x.unflatten(-1, (heads, -1)).transpose(1, 2)
        return x if norm is None else norm(x)

    return projected


def _without_bias(layer: nn.Module, x: torch.Tensor, quiet: Quiet) -> torch.Tensor:
    with quiet():
        y: torch.Tensor = layer(x)
        if layer.bias is not None:
            # Computed by calling the layer, because offloading loads its parameters only for the call.
            y = y - layer(torch.zeros_like(x[:1, :1]))
    return y
