"""Res-Tuning-Bypass: a narrow side network on detached features (Res-Tuning, arXiv 2310.19859).

The paper's chain, written for a U-Net: the state visits the tapped sites in the order of the forward pass, changes
width and resolution with them, and is written back once, at the input of the output head. Additions to the paper: both
tuners mix neighboring positions with a depthwise convolution and are conditioned on the timestep, and a single
zero-initialized gate at the end makes the residual zero at the start.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..backbones import BaseInfo, Site
from ..backbones.site_names import OUT, match_sites, of_family
from ..utils.autocast import as_input
from .base import Features, Part, init_linear, init_zero, pointwise
from .configs import BypassConfig

_TIME_WIDTH = 64


def _normalize(x: torch.Tensor) -> torch.Tensor:
    """Normalize each feature map to zero mean and unit variance; the scales of taps differ by orders of magnitude."""
    return F.group_norm(x, 1)


def _resample(x: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Resize a feature map without parameters: average pooling when shrinking, nearest neighbor when enlarging."""
    if x.shape[-2:] == size:
        return x
    if size[-1] < x.shape[-1]:
        return F.adaptive_avg_pool2d(x, (size[0], size[1]))
    return F.interpolate(x, size=size, mode="nearest")


def _modulate(x: torch.Tensor, film: nn.Linear | None, time: torch.Tensor | None) -> torch.Tensor:
    """Scale and shift the channels depending on the timestep, if the base has one."""
    if film is None:
        return x
    scale, shift = film(time)[:, :, None, None].chunk(2, dim=1)
    return x * (1 + scale) + shift


def _init_layers(tuner: nn.Module, generator: torch.Generator | None) -> None:
    """Initialize all layers randomly; the zero-initialized gate at the end of the chain makes the residual zero."""
    for layer in tuner.children():
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        init_linear(layer, generator)


class HorizontalTuner(nn.Module):
    """Horizontal tuner `H_l`, which reads a tapped feature.

    A linear layer on the normalized tap, time-dependent scale and shift, a depthwise 3x3 convolution with a shortcut,
    and GELU. In the last stage, it is the only tuner between the base's last feature and the output head; if it is
    purely linear there, a bypass learns less than half as much (docs/bypass.md).

    Args:
        tap_channels: width of the tapped feature.
        channels: width of the output.
        mixes: whether a depthwise convolution mixes neighboring positions; False for tokens outside a grid.
        timed: whether the base has a time embedding.
    """

    def __init__(self, tap_channels: int, channels: int, mixes: bool = True, timed: bool = True) -> None:
        super().__init__()
        self.down = nn.Linear(tap_channels, channels)
        self.film = nn.Linear(_TIME_WIDTH, 2 * channels) if timed else None
        self.mix = nn.Conv2d(channels, channels, 3, padding=1, groups=channels) if mixes else None

    def forward(self, tap: torch.Tensor, time: torch.Tensor | None) -> torch.Tensor:
        """Map a tap `(batch, tap_channels, h, w)` to `(batch, channels, h, w)`; `time` is `(batch, time width)`."""
        read = _modulate(pointwise(_normalize(tap), self.down), self.film, time)
        if self.mix is not None:
            read = read + self.mix(read)
        return F.gelu(read)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize all layers randomly."""
        _init_layers(self, generator)


class VerticalTuner(nn.Module):
    """Vertical tuner `V_l`, which carries the bypass state to the next stage.

    A 1x1 convolution if the width changes, then a residual block: depthwise 3x3 convolution, time-dependent scale and
    shift, and two linear layers.

    Args:
        in_channels: width of the input state.
        channels: width of the output state.
        hidden: width between the two linear layers.
        mixes: whether a depthwise convolution mixes neighboring positions; False for tokens outside a grid.
        timed: whether the base has a time embedding.
    """

    def __init__(self, in_channels: int, channels: int, hidden: int, mixes: bool = True, timed: bool = True) -> None:
        super().__init__()
        self.transition = nn.Linear(in_channels, channels) if in_channels != channels else None
        self.mix = nn.Conv2d(channels, channels, 3, padding=1, groups=channels) if mixes else None
        self.film = nn.Linear(_TIME_WIDTH, 2 * channels) if timed else None
        self.down = nn.Linear(channels, hidden)
        self.up = nn.Linear(hidden, channels)

    def forward(self, state: torch.Tensor, time: torch.Tensor | None, size: torch.Size) -> torch.Tensor:
        """Map a state `(batch, in_channels, h, w)` to `(batch, channels, *size)`; `time` is `(batch, time width)`."""
        if self.transition is not None:
            state = pointwise(state, self.transition)
        state = _resample(state, size)
        mixed = _modulate(_normalize(state if self.mix is None else self.mix(state)), self.film, time)
        return state + pointwise(F.gelu(pointwise(mixed, self.down)), self.up)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize all layers randomly."""
        _init_layers(self, generator)


class BypassStage(nn.Module):
    """Stage `b_l = lam_l * H_l(sg(x_l)) + (1 - lam_l) * V_l(b_{l-1})` with `lam_l = sigmoid(logit)`, 0.5 at the start.

    Args:
        tap_channels: width of the tapped feature `x_l`.
        channels: width of the state `b_l`.
        in_channels: width of the state `b_{l-1}`; None for the first stage, which is `b_0 = H_0(sg(x_0))`.
        expansion: inner width of the vertical tuner, as a multiple of `channels`.
        mixes: whether the tuners mix neighboring positions.
        timed: whether the base has a time embedding.
    """

    def __init__(
        self,
        tap_channels: int,
        channels: int,
        in_channels: int | None,
        expansion: float,
        mixes: bool = True,
        timed: bool = True,
    ) -> None:
        super().__init__()
        self.horizontal = HorizontalTuner(tap_channels, channels, mixes, timed)
        self.vertical: VerticalTuner | None = None
        if in_channels is not None:
            self.vertical = VerticalTuner(in_channels, channels, max(1, round(expansion * channels)), mixes, timed)
            self.logit = nn.Parameter(torch.zeros(()))

    def forward(self, tap: torch.Tensor, state: torch.Tensor | None, time: torch.Tensor | None) -> torch.Tensor:
        """Return the state `(batch, channels, h, w)` at the resolution of `tap` `(batch, tap_channels, h, w)`."""
        read: torch.Tensor = self.horizontal(tap, time)
        if self.vertical is None or state is None:
            return read
        lam = torch.sigmoid(self.logit)
        return lam * read + (1 - lam) * self.vertical(state, time, tap.shape[-2:])

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize both tuners randomly and set lam to 0.5."""
        self.horizontal.reset_parameters(generator)
        if self.vertical is not None:
            self.vertical.reset_parameters(generator)
            nn.init.zeros_(self.logit)


class BypassPart(Part):
    """Part with the whole chain: one stage per tap, a shared time projection, and the gate at the site `out`."""

    def __init__(self, config: BypassConfig, base: BaseInfo) -> None:
        super().__init__()
        stations = [name for name in base.stations if name != OUT]
        self.taps = tuple(match_sites(config.taps, stations) if config.taps else _usual_taps(stations))
        self.writes = (OUT,)
        self._sites = {name: base.sites[name] for name in self.taps}
        timed = base.time_channels > 0
        self.time = nn.Linear(base.time_channels, _TIME_WIDTH) if timed else None
        previous = None
        for name, site in self._sites.items():
            channels = max(8, round(config.ratio * site.channels))
            stage = BypassStage(site.channels, channels, previous, config.expansion, site.extra_tokens == 0, timed)
            self.register_site(name, stage)
            previous = channels
        assert previous is not None
        self.gate = nn.Linear(previous, base.sites[OUT].channels)

    def forward(self, site: str, x: torch.Tensor, features: Features) -> torch.Tensor:
        """Run the chain over the tapped features and return the residual for `out`."""
        dtype = self.gate.weight.dtype
        time = None
        if self.time is not None:
            assert features.time is not None
            time = self.time(F.silu(as_input(features.time.detach(), dtype)))
        state: torch.Tensor | None = None
        for name, tapped in self._sites.items():
            tap = _as_map(as_input(features.by_site[name].detach(), dtype), tapped, features.size)
            state = self.at_site[name](tap, state, time)
        assert state is not None
        if x.dim() == 3:
            return pointwise(state, self.gate).flatten(2).transpose(1, 2)
        # The last tap may have a lower resolution than `out`.
        return pointwise(_resample(state, x.shape[-2:]), self.gate)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize every stage randomly and set the gate to zero."""
        if self.time is not None:
            init_linear(self.time, generator)
        for stage in self.at_site.values():
            assert isinstance(stage, BypassStage)
            stage.reset_parameters(generator)
        init_zero(self.gate)


def _usual_taps(stations: list[str]) -> list[str]:
    """Return the default taps: the first and the last station of a U-Net, all stations of other bases.

    With more taps of a U-Net, a bypass can identify the training image, and overfits.
    """
    return [stations[0], stations[-1]] if of_family(stations[:1], "skip") else stations


def _as_map(x: torch.Tensor, site: Site, size: tuple[int, int]) -> torch.Tensor:
    """Reshape tokens `(batch, tokens, channels)` to their grid, or to one column if some tokens are outside it."""
    if x.dim() == 4:
        return x
    height, width = (size[0] // site.stride, size[1] // site.stride) if not site.extra_tokens else (x.shape[1], 1)
    return x.transpose(1, 2).unflatten(2, (height, width))
