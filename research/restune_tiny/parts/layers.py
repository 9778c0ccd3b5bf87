"""Replacements for diffusers layers that are slow or incorrect when trained on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn


def double_by_copies(module: nn.Module) -> None:
    """Replace nearest upsampling with copies: PyTorch 2.13's CPU compiler loses its gradient for large inputs."""

    def double(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        count, channels, height, width = inputs[0].shape
        copies = inputs[0][:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2)
        return (copies.reshape(count, channels, 2 * height, 2 * width), *inputs[1:])

    for part in module.modules():
        if isinstance(part, Upsample2D):
            part.interpolate = False
            part.register_forward_pre_hook(double)


class SharedTextAttention:
    """Attention processor for consecutive samples with one caption, projected once: (k * captions) queries."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Return the attention output; the arguments are those of diffusers."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        heads, width = attn.heads, attn.to_q.out_features
        query, key, value = (
            layer(states).view(context.shape[0], -1, heads, width // heads).transpose(1, 2)
            for layer, states in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        weights = torch.softmax((query * (width // heads) ** -0.5) @ key.transpose(-1, -2), dim=-1)
        mixed = (weights @ value).transpose(1, 2).reshape(hidden_states.shape[0], -1, width)
        out: Tensor = attn.to_out[0](mixed)
        return out
