"""Equation that skip tuners, adapters and LoRA share, so that several of them can be computed as one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Bottleneck:
    """Layer `scale * (W_up f(W_down x + b_down) + b_up)` at every position.

    Attributes:
        down: `W_down` and, if there is one, `b_down`.
        up: `W_up` and, if there is one, `b_up`.
        gelu: whether `f` is GELU; otherwise it is the identity.
        channels_first: whether `x` is `(batch, channels, height, width)`; otherwise `(batch, tokens, channels)`.
        scale: one factor, or one for each output channel.
    """

    down: nn.Linear
    up: nn.Linear
    gelu: bool
    channels_first: bool = False
    scale: torch.Tensor | float = 1.0

    @property
    def parameters(self) -> list[torch.Tensor]:
        """Parameters of the layer."""
        found = [self.down.weight, self.down.bias, self.up.weight, self.up.bias, self.scale]
        return [each for each in found if isinstance(each, torch.Tensor)]
