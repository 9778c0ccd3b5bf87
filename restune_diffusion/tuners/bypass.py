"""Res-Tuning-Bypass: a narrow side network on detached features (Res-Tuning, arXiv 2310.19859).

The paper's chain, written for a U-Net: the state visits the tapped sites in the order of the forward pass, changes
width and resolution with them, and is written back once, at the input of the output head. Additions to the paper: both
tuners mix neighboring positions with a depthwise convolution and are conditioned on the timestep, and a single
zero-initialized gate at the end makes the residual zero at the start. Two other forms of the side network are in
`side_networks/`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ..backbones import BaseInfo, Site
from ..backbones.site_names import OUT, match_sites, of_family
from ..utils.autocast import as_input
from ..utils.errors import RestuneError
from .base import Features, Part, init_linear, init_zero, pointwise
from .configs import BypassConfig
from .side_networks.chain import BypassStage
from .side_networks.common import TIME_WIDTH, resample
from .side_networks.mixers import MixerStage
from .side_networks.redundancy import RedundancyAggregation


class BypassPart(Part):
    """Part with a whole side network: one stage per tap, a shared time projection, and the gate at the site `out`."""

    def __init__(self, config: BypassConfig, base: BaseInfo) -> None:
        super().__init__()
        stations = [name for name in base.stations if name != OUT]
        self.taps = tuple(match_sites(config.taps, stations) if config.taps else _usual_taps(stations, config.form))
        self.writes = (OUT,)
        self._sites = {name: base.sites[name] for name in self.taps}
        _check(config, self._sites)
        timed = base.time_channels > 0
        self.time = nn.Linear(base.time_channels, TIME_WIDTH) if timed else None
        last = base.sites[self.taps[-1]].channels
        previous = None
        for number, (name, site) in enumerate(self._sites.items()):
            # Reads that are aggregated have one width.
            channels = max(8, round(config.ratio * (last if config.form == "redundancy" else site.channels)))
            stage: BypassStage | MixerStage
            if config.form == "mixers":
                tokens = (len(self._sites) - number) % 2 == 0
                stage = MixerStage(site.channels, channels, previous, config.mixer_rank, tokens, timed)
            else:
                before = previous if config.form == "chain" else None
                stage = BypassStage(site.channels, channels, before, config.expansion, site.extra_tokens == 0, timed)
            self.register_site(name, stage)
            previous = channels
        assert previous is not None
        self.aggregation = RedundancyAggregation(previous) if config.form == "redundancy" else None
        self.gate = nn.Linear(previous, base.sites[OUT].channels)

    def forward(self, site: str, x: torch.Tensor, features: Features) -> torch.Tensor:
        """Run the side network over the tapped features and return the residual for `out`."""
        dtype = self.gate.weight.dtype
        time = None
        if self.time is not None:
            assert features.time is not None
            time = self.time(F.silu(as_input(features.time.detach(), dtype)))
        state: torch.Tensor | None = None
        reads: list[torch.Tensor] = []
        for name, tapped in self._sites.items():
            tap = _as_map(as_input(features.by_site[name].detach(), dtype), tapped, features.size)
            state = self.at_site[name](tap, state, time)
            if self.aggregation is not None:
                reads.append(state)
        if self.aggregation is not None:
            state = self.aggregation(reads)
        assert state is not None
        if x.dim() == 3:
            return pointwise(state, self.gate).flatten(2).transpose(1, 2)
        # The last tap may have a lower resolution than `out`.
        return pointwise(resample(state, x.shape[-2:]), self.gate)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize every stage randomly and set the gate to zero."""
        if self.time is not None:
            init_linear(self.time, generator)
        for stage in self.at_site.values():
            assert isinstance(stage, BypassStage | MixerStage)
            stage.reset_parameters(generator)
        if self.aggregation is not None:
            self.aggregation.reset_parameters()
        init_zero(self.gate)


def _check(config: BypassConfig, taps: Mapping[str, Site]) -> None:
    """Raise `RestuneError` if the form of the side network does not fit the taps."""
    if config.form == "redundancy" and len(taps) < 3:
        raise RestuneError(
            f"A bypass of form `redundancy` weights the taps before the last one and needs 3 taps or more, but has "
            f"{', '.join(taps)}; leave bypass.taps out to read all."
        )
    outside = [name for name, site in taps.items() if site.extra_tokens]
    if config.form == "mixers" and outside:
        raise RestuneError(
            f"A bypass of form `mixers` mixes the tokens of a grid, but {outside[0]} of this base has tokens outside "
            f"the grid; choose form `chain` or `redundancy`."
        )


def _usual_taps(stations: list[str], form: str) -> list[str]:
    """Return the default taps: all stations, but of a U-Net the first and the last for the chain.

    With more taps of a U-Net, a bypass can identify the training image, and overfits.
    """
    return [stations[0], stations[-1]] if form == "chain" and of_family(stations[:1], "skip") else stations


def _as_map(x: torch.Tensor, site: Site, size: tuple[int, int]) -> torch.Tensor:
    """Reshape tokens `(batch, tokens, channels)` to their grid, or to one column if some tokens are outside it."""
    if x.dim() == 4:
        return x
    height, width = (size[0] // site.stride, size[1] // site.stride) if not site.extra_tokens else (x.shape[1], 1)
    return x.transpose(1, 2).unflatten(2, (height, width))
