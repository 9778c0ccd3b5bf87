"""What every part of a tuner has in common."""

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
    """The base's own projections of an attention operation; calling them runs the frozen layers, without tuners.

    Each maps `(batch, tokens, width)`; `query` and `key` include the base's query and key norms, if it has any, which
    is why they return `(batch, heads, tokens, head width)`, as does `value`. `output` maps `(batch, tokens, inner
    width)` to the operation's output without the output layer's bias.
    """

    query: Callable[[torch.Tensor], torch.Tensor]
    key: Callable[[torch.Tensor], torch.Tensor]
    value: Callable[[torch.Tensor], torch.Tensor]
    output: Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Operation:
    """What a tuner in parallel to an operation of a transformer block sees beside the operation's input."""

    context: torch.Tensor | None = None
    """What attention reads keys and values from, `(batch, tokens, width)`; None where that is the input itself."""
    mask: torch.Tensor | None = None
    """Added to the attention scores, broadcast to `(batch, heads, queries, keys)`."""
    attention: FrozenAttention | None = None
    """The frozen projections, where the operation is attention."""

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
    """What one forward pass of the base has shown so far; it lives no longer than that pass."""

    by_site: dict[str, torch.Tensor] = field(default_factory=dict)
    """Tapped features, `(batch, channels, height, width)` or `(batch, tokens, channels)`, as the base made them,
    before any residual was added."""
    time: torch.Tensor | None = None
    """Time embedding `(batch, time_channels)`, before its activation."""
    text: torch.Tensor | None = None
    """Text states `(batch, tokens, cross_attention_dim)`."""
    size: tuple[int, int] = (0, 0)
    """Height and width of what the base was called on, in the unit of the sites' strides."""
    operation: Operation | None = None
    """The operation at whose site a residual is asked for, if that is a site of a transformer block."""
    conditions: tuple[dict[str, torch.Tensor], ...] = ()
    """For each condition its features by site, as the part's own `encode` made them: one row for each of the batch."""
    condition_weights: tuple[float, ...] = ()
    """Factor on what each condition adds."""

    def beside(self, operation: Operation | None) -> Features:
        """The same at the site of an operation."""
        return Features(
            self.by_site, self.time, self.text, self.size, operation, self.conditions, self.condition_weights
        )

    def given(self, conditions: tuple[dict[str, torch.Tensor], ...], weights: tuple[float, ...]) -> Features:
        """The same with condition images."""
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


class Part(nn.Module):
    """One family of modules inside a tuner: reads features at some sites and makes residuals for some sites.

    Submodules are registered under the dotted name of their site, so that a key of the state dict reads
    `<site>.<module>.<param>`.
    """

    taps: tuple[str, ...]
    """Sites, other than the one written to, whose features must be in `Features.by_site`."""
    writes: tuple[str, ...]
    """Sites for which `forward` makes a residual. Beside the base's sites these may be linear layers of a transformer
    block's operation, `<site>.<path of the layer>`, where `x` is the layer's input and the residual adds to its
    output."""
    needs: tuple[str, ...] = ()
    """Sites of transformer blocks whose description the part was built from."""
    text_encoders: tuple[str, ...] = ()
    """Text encoders that the part acts on; a part with any is a `TextPart`."""
    conditions: tuple[str, ...] = ()
    """Names of the condition images that the part takes, in the order in which they are given."""
    channels: int = 3
    """Channels of a condition image."""

    def __init__(self) -> None:
        super().__init__()
        # Not a ModuleDict: its keys may hold no dots. These are second references, so torch does not see them.
        self.at_site: dict[str, nn.Module] = {}
        """The modules by site, as `register_site` got them."""

    def forward(self, site: str, x: torch.Tensor, features: Features) -> torch.Tensor:
        """Return the residual for the feature `x` at one of `writes`, of its shape, in the part's dtype."""
        raise NotImplementedError

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial parameters; the residual is zero afterwards."""
        raise NotImplementedError

    def initialize_from(self, encoders: Mapping[str, TextEncoder]) -> None:
        """Set initial parameters that depend on the weights of text encoders, after `reset_parameters`; none do here.

        Args:
            encoders: the text encoders by name.
        """

    def encode(
        self, images: Sequence[torch.Tensor | None], size: tuple[int, int]
    ) -> tuple[dict[str, torch.Tensor], ...]:
        """Make the features of condition images, for a part with `conditions`; they belong in `Features.conditions`.

        Args:
            images: for each condition images `(n, channels, height, width)` with values from 0 to 1, or None to leave
                the condition out.
            size: height and width of the latent.

        Returns:
            For each condition its features by site, `(n, channels, height, width)`; empty for one left out.
        """
        raise NotImplementedError

    def loras(self) -> dict[str, ResLora]:
        """Return the layers that merge into the base's weights, by the site of their linear layer; none here."""
        return {}

    def register_site(self, site: str, module: nn.Module) -> None:
        """Add the module of a site, under the site's dotted name."""
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
    """Draw weight and bias as torch does by default, but from the given generator."""
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    if layer.bias is not None:
        bound = 1 / math.sqrt(layer.weight[0].numel())
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def init_zero(layer: nn.Linear | nn.Conv2d) -> None:
    """Set weight and bias to zero."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
