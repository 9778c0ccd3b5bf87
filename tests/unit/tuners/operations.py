"""Real attention modules of diffusers as the operations that tuners run in parallel to."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention

from restune_diffusion.tuners import FrozenAttention

HEADS, HEAD_WIDTH, CHANNELS, CONTEXT = 3, 8, 20, 14


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_attention(cross: bool, seed: int = 0, **changes: Any) -> Attention:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        attention = Attention(
            CHANNELS, CONTEXT if cross else None, heads=HEADS, dim_head=HEAD_WIDTH, bias=False, **changes
        )
    return attention.double().requires_grad_(False)


def frozen(attention: Attention) -> FrozenAttention:
    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)

    return FrozenAttention(
        query=lambda x: heads(attention.to_q(x)),
        key=lambda x: heads(attention.to_k(x)),
        value=lambda x: heads(attention.to_v(x)),
        output=lambda x: F.linear(x, attention.to_out[0].weight),
    )


class PrependingProcessor:
    """Return the attention of diffusers' `AttnProcessor` with additional keys and values before its own."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self.key, self.value = key, value

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        batch, context = len(hidden_states), hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        # `key` is (length, heads, head width); flattened, its rows have the layout of the key layer's output.
        own = [extra.flatten(1)[None].repeat(batch, 1, 1) for extra in (self.key, self.value)]
        key = attn.head_to_batch_dim(torch.cat([own[0], attn.to_k(context)], dim=1))
        value = attn.head_to_batch_dim(torch.cat([own[1], attn.to_v(context)], dim=1))
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (len(self.key), 0)).repeat_interleave(attn.heads, dim=0)
        scores = attn.get_attention_scores(query, key, attention_mask)
        return attn.to_out[0](attn.batch_to_head_dim(scores @ value))
