"""Stages of the bypass of Res-Tuning (arXiv 2310.19859): horizontal and vertical tuners in a chain."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..base import pointwise
from .common import TIME_WIDTH, init_layers, modulate, normalize, resample


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
        self.film = nn.Linear(TIME_WIDTH, 2 * channels) if timed else None
        self.mix = nn.Conv2d(channels, channels, 3, padding=1, groups=channels) if mixes else None

    def forward(self, tap: torch.Tensor, time: torch.Tensor | None) -> torch.Tensor:
        """Map a tap `(batch, tap_channels, h, w)` to `(batch, channels, h, w)`; `time` is `(batch, time width)`."""
        read = modulate(pointwise(normalize(tap), self.down), self.film, time)
        if self.mix is not None:
            read = read + self.mix(read)
        return F.gelu(read)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize all layers randomly."""
        init_layers(self.children(), generator)


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
        self.film = nn.Linear(TIME_WIDTH, 2 * channels) if timed else None
        self.down = nn.Linear(channels, hidden)
        self.up = nn.Linear(hidden, channels)

    def forward(self, state: torch.Tensor, time: torch.Tensor | None, size: torch.Size) -> torch.Tensor:
        """Map a state `(batch, in_channels, h, w)` to `(batch, channels, *size)`; `time` is `(batch, time width)`."""
        if self.transition is not None:
            state = pointwise(state, self.transition)
        state = resample(state, size)
        mixed = modulate(normalize(state if self.mix is None else self.mix(state)), self.film, time)
        return state + pointwise(F.gelu(pointwise(mixed, self.down)), self.up)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize all layers randomly."""
        init_layers(self.children(), generator)


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
