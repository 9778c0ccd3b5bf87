"""Show a tuner the operation of a transformer block that it is attached to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from .tuners import FrozenAttention, Operation

Quiet = Callable[[], AbstractContextManager[None]]


def operation_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return what an operation was called on."""
    x: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return x


def show_operation(module: nn.Module, kwargs: dict[str, Any], quiet: Quiet) -> Operation:
    """Describe a call of an operation to the tuners beside it.

    Args:
        module: diffusers' `Attention`, `FeedForward` or `BasicTransformerBlock`.
        kwargs: the keyword arguments of its call.
        quiet: a context in which the base's layers run without tuners.
    """
    context = text_states(kwargs.get("encoder_hidden_states"))
    if not hasattr(module, "to_q"):
        return Operation(context)
    return Operation(context, _score_mask(kwargs.get("attention_mask")), _frozen(module, context is not None, quiet))


def text_states(states: Any) -> torch.Tensor | None:
    """Return the text states alone: an IP-Adapter puts image states beside them."""
    return states[0] if isinstance(states, tuple) else states


def _score_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Bring diffusers' `(batch, keys)` or `(batch, queries or 1, keys)` to the shape of attention scores."""
    if mask is None:
        return None
    return mask[:, None, None] if mask.dim() == 2 else mask[:, None]


def _frozen(attention: Any, reads_context: bool, quiet: Quiet) -> FrozenAttention:
    def heads(x: torch.Tensor, norm: Callable[[torch.Tensor], torch.Tensor] | None) -> torch.Tensor:
        x = x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        return x if norm is None else norm(x)

    def normed(x: torch.Tensor) -> torch.Tensor:
        return attention.norm_encoder_hidden_states(x) if reads_context and attention.norm_cross else x

    def query(x: torch.Tensor) -> torch.Tensor:
        with quiet():
            return heads(attention.to_q(x), attention.norm_q)

    def key(x: torch.Tensor) -> torch.Tensor:
        with quiet():
            return heads(attention.to_k(normed(x)), attention.norm_k)

    def value(x: torch.Tensor) -> torch.Tensor:
        with quiet():
            return heads(attention.to_v(normed(x)), None)

    def output(x: torch.Tensor) -> torch.Tensor:
        layer = attention.to_out[0]
        with quiet():
            y = layer(x)
            if layer.bias is not None:
                # Asked of the layer, as offloading keeps its parameters away until it is called.
                y = y - layer(torch.zeros_like(x[:1, :1]))
        return y / attention.rescale_output_factor

    return FrozenAttention(query, key, value, output)
