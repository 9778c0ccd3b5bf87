"""Low-rank mixers of channels and tokens in turn, after LoSA (CVPR 2024, arXiv 2402.02887).

LoSA as recalled, not checked against the paper's text: `y_l = y_{l-1} + g_l(b_l + y_{l-1})` on the backbone's features
`b_l`, where `g_l` is the low-rank `W_up GELU(W_down z)` along the channels and along the tokens in turn.

Adaptations to a U-Net, whose taps differ in width and resolution:

- `b_l` is a linear layer on the normalized tap, with scale and shift by the timestep; the first stage is `y_1 = b_1`.
- `y_{l-1}` is resized to the tap, and a linear layer changes its width where the taps differ.
- The token mixer works on a fixed grid of 8 x 8: `z` is averaged (or repeated) to it, and the result is interpolated
  back. So its parameters are bound to relative positions in the image and to no number of tokens: a tuner works at any
  resolution and aspect ratio.
- The last stage mixes channels, because the grid is coarser than the output; the stages before it alternate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..base import pointwise
from .common import TIME_WIDTH, init_layers, modulate, normalize, resample

GRID = 8
"""Height and width of the grid on which tokens are mixed."""


class LowRankMixer(nn.Module):
    """Low-rank mixer `W_up GELU(W_down z)` along the channels of every position, or along the tokens of every channel.

    Args:
        channels: width of the features.
        rank: inner width.
        tokens: whether to mix tokens, on a fixed grid, instead of channels.
    """

    def __init__(self, channels: int, rank: int, tokens: bool) -> None:
        super().__init__()
        mixed = GRID * GRID if tokens else channels
        self.tokens = tokens
        self.down = nn.Linear(mixed, rank)
        self.up = nn.Linear(rank, mixed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(batch, channels, h, w)` to the same shape."""
        if not self.tokens:
            return pointwise(F.gelu(pointwise(x, self.down)), self.up)
        mixed = self.up(F.gelu(self.down(F.adaptive_avg_pool2d(x, (GRID, GRID)).flatten(2))))
        return F.interpolate(mixed.unflatten(2, (GRID, GRID)), size=x.shape[-2:], mode="bilinear")


class MixerStage(nn.Module):
    """Stage `y_l = R(y_{l-1}) + g_l(b_l + R(y_{l-1}))`, where `R` changes width and resolution; `y_1 = b_1`.

    Args:
        tap_channels: width of the tapped feature.
        channels: width of the state `y_l`.
        in_channels: width of the state `y_{l-1}`; None for the first stage.
        rank: inner width of the mixer.
        tokens: whether the stage mixes tokens instead of channels.
        timed: whether the base has a time embedding.
    """

    def __init__(
        self, tap_channels: int, channels: int, in_channels: int | None, rank: int, tokens: bool, timed: bool = True
    ) -> None:
        super().__init__()
        self.down = nn.Linear(tap_channels, channels)
        self.film = nn.Linear(TIME_WIDTH, 2 * channels) if timed else None
        self.transition: nn.Linear | None = None
        self.mixer: LowRankMixer | None = None
        if in_channels is not None:
            self.transition = nn.Linear(in_channels, channels) if in_channels != channels else None
            self.mixer = LowRankMixer(channels, rank, tokens)

    def forward(self, tap: torch.Tensor, state: torch.Tensor | None, time: torch.Tensor | None) -> torch.Tensor:
        """Return the state `(batch, channels, h, w)` at the resolution of `tap` `(batch, tap_channels, h, w)`."""
        read = modulate(pointwise(normalize(tap), self.down), self.film, time)
        if self.mixer is None or state is None:
            return read
        if self.transition is not None:
            state = pointwise(state, self.transition)
        state = resample(state, tap.shape[-2:])
        mixed: torch.Tensor = self.mixer(read + state)
        return state + mixed

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize all layers randomly; the gate behind the last stage makes the residual zero."""
        layers = [child for child in self.children() if isinstance(child, nn.Linear)]
        init_layers([*layers, *(self.mixer.children() if self.mixer is not None else ())], generator)
