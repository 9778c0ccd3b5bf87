"""SC-Tuner: a bottleneck on each skip connection of a U-Net (SCEdit, arXiv 2312.11392)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..backbones import BaseInfo, late_skips
from ..backbones.site_names import match_sites
from ..utils.autocast import as_input
from ..utils.errors import RestuneError
from .base import Bottleneck, Features, Part, init_linear, init_zero, pointwise
from .configs import SkipConfig


class SkipTuner(nn.Module):
    """Bottleneck `W_up GELU(W_down x)` at every position; `W_up` is zero-initialized.

    Args:
        channels: width of the feature.
        width: width of the bottleneck.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(channels, width)
        self.up = nn.Linear(width, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map a feature `(batch, channels, height, width)` to a residual of the same shape."""
        return pointwise(F.gelu(pointwise(x, self.down)), self.up)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize `W_down` randomly and `W_up` with zeros."""
        init_linear(self.down, generator)
        init_zero(self.up)


class SkipPart(Part):
    """Part with an SC-Tuner on every selected skip connection."""

    def __init__(self, config: SkipConfig, base: BaseInfo) -> None:
        super().__init__()
        self.taps = ()
        self.writes = tuple(match_sites(config.sites, base.skips))
        if config.grad_depth is not None:
            late = late_skips(base, config.grad_depth)
            self.writes = tuple(site for site in self.writes if site in late)
            if not self.writes:
                raise RestuneError(
                    f"None of the selected skips enters the last {config.grad_depth} up blocks, which take "
                    f"{', '.join(late)}; choose other sites or a larger grad_depth."
                )
        for site in self.writes:
            channels = base.sites[site].channels
            self.register_site(site, SkipTuner(channels, max(1, round(config.ratio * channels))))

    def forward(self, site: str, x: torch.Tensor, features: Features) -> torch.Tensor:
        """Return the residual for a skip feature."""
        tuner = self.at_site[site]
        assert isinstance(tuner, SkipTuner)
        return tuner(as_input(x, tuner.down.weight.dtype))

    def bottleneck(self, site: str) -> Bottleneck:
        """Return the layer of a skip connection."""
        tuner = self.at_site[site]
        assert isinstance(tuner, SkipTuner)
        return Bottleneck(tuner.down, tuner.up, gelu=True, channels_first=True)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize the tuner of every site."""
        for tuner in self.at_site.values():
            assert isinstance(tuner, SkipTuner)
            tuner.reset_parameters(generator)
