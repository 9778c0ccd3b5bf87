"""SC-Tuner layers as plain tensors, the intermediate form between other programs' layouts and a `skip` part."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..backbones import BaseInfo
from ..tuners.configs import SkipConfig
from ..tuners.tuner import Tuner
from ..utils.errors import TunerFileError
from .foreign import make_config

WIDTHS_KEY = "restune.interchange.widths"
"""Header entry: widths of the bottlenecks before they were padded with zeros to a common ratio, by site."""


@dataclass(frozen=True)
class SkipLayer:
    """SC-Tuner `W_up GELU(W_down x + b_down) + b_up`; `down` is `(width, channels)`, `up` is `(channels, width)`."""

    down: torch.Tensor
    down_bias: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor

    @property
    def width(self) -> int:
        """Width of the bottleneck."""
        return self.down.shape[0]

    def of_width(self, width: int) -> SkipLayer:
        """Pad the bottleneck with zeros, or remove zeros from it; the output does not change, because GELU(0) = 0.

        Raises:
            TunerFileError: if values to remove are not zero.
        """
        removed = (self.down[width:], self.down_bias[width:], self.up[:, width:])
        if any(piece.any() for piece in removed):
            raise TunerFileError(
                f"A bottleneck of width {self.width} cannot be reduced to {width}: the removed values are not zero."
            )
        more = width - self.width
        return SkipLayer(
            F.pad(self.down, (0, 0, 0, more)),
            F.pad(self.down_bias, (0, more)),
            F.pad(self.up, (0, more)),
            self.up_bias,
        )


def our_width(ratio: float, channels: int) -> int:
    """Return the width of a `skip` part's bottleneck."""
    return max(1, round(ratio * channels))


def fit_ratio(widths: Mapping[str, tuple[int, int]], width_at: Callable[[float, int], int], slack: float) -> float:
    """Return a ratio that gives every bottleneck its width, or the smallest ratio that gives each at least its width.

    Args:
        widths: channels and bottleneck width by site.
        width_at: function of a program from ratio and channels to bottleneck width.
        slack: how far below an integer width the product of ratio and channels may be to be rounded to it.
    """
    low = max((width - slack) / channels for channels, width in widths.values())
    high = min((width + 1 - slack) / channels for channels, width in widths.values())
    # A ratio set by a user is usually one of these; only rounded widths need a number in between.
    candidates = [width / channels for channels, width in widths.values()] + [(low + high) / 2]
    for ratio in candidates:
        if all(width_at(ratio, channels) == width for channels, width in widths.values()):
            return ratio
    ratio = low
    while any(width_at(ratio, channels) < width for channels, width in widths.values()):
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def skip_tuner(layers: Mapping[str, SkipLayer], base: BaseInfo, metadata: Mapping[str, str], source: str) -> Tuner:
    """Create a tuner from SC-Tuner layers.

    Args:
        layers: layers by site.
        base: structure of the base.
        metadata: header entries to keep.
        source: name of the source file, for messages.

    Raises:
        TunerFileError: if there are no layers, or one does not fit its site.
    """
    skips = {name: base.sites[name].channels for name in base.skips}
    if not layers:
        raise TunerFileError(f"{source} contains no tuner for a skip connection.")
    for site, layer in layers.items():
        channels, width = skips[site], layer.width
        shapes = tuple(tuple(t.shape) for t in (layer.down, layer.down_bias, layer.up, layer.up_bias))
        if shapes != ((width, channels), (width,), (channels, width), (channels,)):
            raise TunerFileError(
                f"{source} is for another base: at {site} this base has {channels} channels, but the file's tensors "
                f"have shapes {shapes}."
            )
    widths = {site: (skips[site], layer.width) for site, layer in layers.items()}
    ratio = fit_ratio(widths, our_width, slack=0.5)
    padded = {site: layer.of_width(our_width(ratio, skips[site])) for site, layer in layers.items()}
    header = {key: value for key, value in metadata.items() if key != WIDTHS_KEY}
    if any(padded[site].width != layer.width for site, layer in layers.items()):
        header[WIDTHS_KEY] = json.dumps({site: layer.width for site, layer in layers.items()})
    sites = tuple(site for site in skips if site in layers)
    patterns = ("skip.*",) if len(sites) == len(skips) else sites
    config = make_config(SkipConfig, source, ratio=ratio, sites=patterns)
    tuner = Tuner.empty((config,), base, header)
    tuner.load_state_dict({key: tensor for site in sites for key, tensor in _named(site, padded[site])}, assign=True)
    return tuner


def skip_layers(tuner: Tuner) -> dict[str, SkipLayer]:
    """Return the SC-Tuner layers of a tuner by site, imported ones with their original widths.

    Raises:
        TunerFileError: if the tuner has other parts.
    """
    families = [config.part for config in tuner.configs]
    if families != ["skip"]:
        raise TunerFileError(f"This layout can only represent skip tuners, but the tuner has the parts {families}.")
    part = next(tuner.parts())
    state = tuner.state_dict()
    layers = {
        site: SkipLayer(*(state[f"skip.{site}.{name}"].detach().cpu() for name in _NAMES)) for site in part.writes
    }
    return without_padding(layers, tuner.metadata)


def without_padding(layers: Mapping[str, SkipLayer], metadata: Mapping[str, str]) -> dict[str, SkipLayer]:
    """Remove the zero padding that the header records; a layer whose padding is no longer zero is not changed."""
    try:
        widths = dict(json.loads(metadata.get(WIDTHS_KEY, "{}")))
    except (ValueError, TypeError, RecursionError):
        return dict(layers)
    return {site: _as_recorded(layer, widths.get(site)) for site, layer in layers.items()}


_NAMES = ("down.weight", "down.bias", "up.weight", "up.bias")


def _named(site: str, layer: SkipLayer) -> list[tuple[str, torch.Tensor]]:
    tensors = (layer.down, layer.down_bias, layer.up, layer.up_bias)
    return [(f"skip.{site}.{name}", tensor) for name, tensor in zip(_NAMES, tensors, strict=True)]


def _as_recorded(layer: SkipLayer, width: object) -> SkipLayer:
    if not isinstance(width, int) or not 0 < width < layer.width:
        return layer
    try:
        return layer.of_width(width)
    except TunerFileError:
        return layer
