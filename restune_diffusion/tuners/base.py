"""`Part`, the base class of the parts of a tuner, its inputs, and helpers for initialization."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from ..backbones import TextEncoder
from .lora import ResLora


@dataclass(frozen=True)
class FrozenAttention:
    """Frozen projections of the base's attention operation; calling them does not run tuners.

    `query`, `key` and `value` map `(batch, tokens, width)` to `(batch, heads, tokens, head width)`. `query` and `key`
    include the base's query and key norms, if it has any. `output` maps `(batch, tokens, inner width)` to the
    operation's output without the bias of the output layer.
    """

    query: Callable[[torch.Tensor], torch.Tensor]
    key: Callable[[torch.Tensor], torch.Tensor]
    value: Callable[[torch.Tensor], torch.Tensor]
    output: Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Operation:
    """Inputs of a tuner in parallel to an operation of a transformer block, in addition to the operation's input."""

    context: torch.Tensor | None = None
    """Input of the key and value projections, `(batch, tokens, width)`; None for self-attention."""
    mask: torch.Tensor | None = None
    """Attention mask, added to the attention scores; broadcastable to `(batch, heads, queries, keys)`."""
    attention: FrozenAttention | None = None
    """Frozen projections, if the operation is attention."""

    def rows(self, rows: torch.Tensor) -> Operation:
        """Select rows of the batch."""
        mask = self.mask
        return Operation(
            None if self.context is None else self.context[rows],
            mask if mask is None or mask.shape[0] == 1 else mask[rows],
            self.attention,
        )


@dataclass
class Features:
    """Features of the base in the current forward pass; valid only during that forward pass."""

    by_site: dict[str, torch.Tensor] = field(default_factory=dict)
    """Tapped features, `(batch, channels, height, width)` or `(batch, tokens, channels)`, before any residual is
    added."""
    time: torch.Tensor | None = None
    """Time embedding `(batch, time_channels)`, before its activation."""
    text: torch.Tensor | None = None
    """Text states `(batch, tokens, cross_attention_dim)`."""
    size: tuple[int, int] = (0, 0)
    """Height and width of the base's input; the sites' strides refer to them."""
    operation: Operation | None = None
    """Operation at the current site, if it is a site of a transformer block."""
    conditions: tuple[dict[str, torch.Tensor], ...] = ()
    """Features of each condition by site, as returned by the part's `encode`; one row per row of the batch."""
    condition_weights: tuple[float, ...] = ()
    """Factor on the residual of each condition."""

    def beside(self, operation: Operation | None) -> Features:
        """Return a copy with another operation."""
        return Features(
            self.by_site, self.time, self.text, self.size, operation, self.conditions, self.condition_weights
        )

    def given(self, conditions: tuple[dict[str, torch.Tensor], ...], weights: tuple[float, ...]) -> Features:
        """Return a copy with other condition features and weights."""
        return Features(self.by_site, self.time, self.text, self.size, self.operation, conditions, weights)

    def rows(self, rows: torch.Tensor) -> Features:
        """Select rows of the batch."""
        return Features(
            {site: feature[rows] for site, feature in self.by_site.items()},
            None if self.time is None else self.time[rows],
            None if self.text is None else self.text[rows],
            self.size,
            None if self.operation is None else self.operation.rows(rows),
            tuple({site: feature[rows] for site, feature in levels.items()} for levels in self.conditions),
            self.condition_weights,
        )


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


class Part(nn.Module):
    """Base class of the parts of a tuner. A part reads features at some sites and returns residuals for some sites.

    Submodules are registered under the dotted name of their site, so that the keys of the state dict have the form
    `<site>.<module>.<param>`.
    """

    taps: tuple[str, ...]
    """Sites, other than the one written to, whose features must be in `Features.by_site`."""
    writes: tuple[str, ...]
    """Sites for which `forward` returns a residual. In addition to the base's sites, these may be linear layers of an
    operation of a transformer block, `<site>.<path of the layer>`: `x` is the layer's input, and the residual is added
    to its output."""
    needs: tuple[str, ...] = ()
    """Sites of transformer blocks whose description was used to build the part."""
    text_encoders: tuple[str, ...] = ()
    """Text encoders on which the part acts; a part with text encoders is a `TextPart`."""
    conditions: tuple[str, ...] = ()
    """Names of the conditions of the part, in the order of their condition images."""
    channels: int = 3
    """Number of channels of the condition images."""

    def __init__(self) -> None:
        super().__init__()
        # A plain dict, because keys of a ModuleDict must not contain dots. `register_site` also adds the submodules.
        self.at_site: dict[str, nn.Module] = {}
        """Modules by site, as passed to `register_site`."""

    def forward(self, site: str, x: torch.Tensor, features: Features) -> torch.Tensor:
        """Return the residual for the feature `x` at one of `writes`, in the shape of `x` and the part's dtype."""
        raise NotImplementedError

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize the parameters; the residual is zero afterwards."""
        raise NotImplementedError

    def bottleneck(self, site: str) -> Bottleneck | None:
        """Return the layer at one of `writes` if `forward` computes just this layer, or None.

        Bottlenecks of several tuners are computed as one.
        """
        return None

    def initialize_from(self, encoders: Mapping[str, TextEncoder]) -> None:
        """Initialize parameters that depend on the weights of text encoders; called after `reset_parameters`.

        The default does nothing.

        Args:
            encoders: text encoders by name.
        """

    def encode(
        self, images: Sequence[torch.Tensor | None], size: tuple[int, int]
    ) -> tuple[dict[str, torch.Tensor], ...]:
        """Encode condition images to features for `Features.conditions`; required for a part with `conditions`.

        Args:
            images: images of each condition, `(n, channels, height, width)` with values from 0 to 1, or None to leave
                the condition out.
            size: height and width of the latent.

        Returns:
            Features of each condition by site, `(n, channels, height, width)`; empty for a condition left out.
        """
        raise NotImplementedError

    def loras(self) -> dict[str, ResLora]:
        """Return the LoRA layers that can be merged into the base's weights, by site of the linear layer.

        The default returns none.
        """
        return {}

    def register_site(self, site: str, module: nn.Module) -> None:
        """Register the module of a site under the site's dotted name."""
        *path, last = site.split(".")
        parent: nn.Module = self
        for step in path:
            if step not in parent._modules:
                parent.add_module(step, nn.Module())
            parent = parent.get_submodule(step)
        parent.add_module(last, module)
        self.at_site[site] = module


def pointwise(x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    """Apply a linear layer over the channels of `x` `(batch, channels, height, width)` at every position."""
    return F.conv2d(x, linear.weight[:, :, None, None], linear.bias)


def init_linear(layer: nn.Linear | nn.Conv2d, generator: torch.Generator | None) -> None:
    """Initialize weight and bias with torch's default distribution, from the given generator."""
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    if layer.bias is not None:
        bound = 1 / math.sqrt(layer.weight[0].numel())
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def init_zero(layer: nn.Linear | nn.Conv2d) -> None:
    """Set weight and bias to zero."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
