"""What every part of a tuner has in common."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Features:
    """What one forward pass of the base has shown so far; it lives no longer than that pass."""

    by_site: dict[str, torch.Tensor] = field(default_factory=dict)
    """Tapped features `(batch, channels, height, width)`, as the base made them, before any residual was added."""
    time: torch.Tensor | None = None
    """Time embedding `(batch, time_channels)`, before its activation."""
    text: torch.Tensor | None = None
    """Text states `(batch, tokens, cross_attention_dim)`."""

    def rows(self, rows: torch.Tensor) -> Features:
        """Select rows of the batch."""
        return Features(
            {site: feature[rows] for site, feature in self.by_site.items()},
            None if self.time is None else self.time[rows],
            None if self.text is None else self.text[rows],
        )


class Part(nn.Module):
    """One family of modules inside a tuner: reads features at some sites and makes residuals for some sites.

    Submodules are registered under the dotted name of their site, so that a key of the state dict reads
    `<site>.<module>.<param>`.
    """

    taps: tuple[str, ...]
    """Sites, other than the one written to, whose features must be in `Features.by_site`."""
    writes: tuple[str, ...]
    """Sites for which `forward` makes a residual."""

    def __init__(self) -> None:
        super().__init__()
        # Not a ModuleDict: its keys may hold no dots. These are second references, so torch does not see them.
        self._at_site: dict[str, nn.Module] = {}

    def forward(self, site: str, x: torch.Tensor, features: Features) -> torch.Tensor:
        """Return the residual for the feature `x` at one of `writes`, of its shape, in the part's dtype."""
        raise NotImplementedError

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial parameters; the residual is zero afterwards."""
        raise NotImplementedError

    def _register_site(self, site: str, module: nn.Module) -> None:
        *path, last = site.split(".")
        parent: nn.Module = self
        for step in path:
            if step not in parent._modules:
                parent.add_module(step, nn.Module())
            parent = parent.get_submodule(step)
        parent.add_module(last, module)
        self._at_site[site] = module


def pointwise(x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    """Apply a linear layer over the channels of `x` `(batch, channels, height, width)` at every position."""
    return F.conv2d(x, linear.weight[:, :, None, None], linear.bias)


def init_linear(layer: nn.Linear | nn.Conv2d, generator: torch.Generator | None) -> None:
    """Draw weight and bias as torch does by default, but from the given generator."""
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    if layer.bias is not None:
        bound = 1 / math.sqrt(layer.weight[0].numel())
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def init_zero(layer: nn.Linear) -> None:
    """Set weight and bias to zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
