"""What a bypass reads of the base: all that its training needs, as no gradient enters the base's blocks.

A bypass writes at the output head alone. So the base's features are the same whatever the bypass has learnt: they may
come from a pass that serves several tuners, or from a disk, and what remains is the bypass itself and the head.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...backbones import run_head, structure_of
from ...backbones.site_names import OUT
from ...tuners import Features
from ...tuners.tuner import Tuner


@dataclass(frozen=True)
class TapFeatures:
    """What one pass of the base showed to a bypass.

    `by_site` holds `(batch, channels, height, width)` of each tapped site and of `out`, `time` the time embedding
    `(batch, channels)` before its activation, and `size` height and width of the latents.
    """

    by_site: Mapping[str, torch.Tensor]
    time: torch.Tensor
    size: tuple[int, int]

    def to(self, device: torch.device, dtype: torch.dtype) -> TapFeatures:
        """Return the same on a device and in a dtype."""
        by_site = {site: feature.to(device, dtype) for site, feature in self.by_site.items()}
        return replace(self, by_site=by_site, time=self.time.to(device, dtype))


class _Recorder:
    """Keeps what the base's hooks show, and changes nothing."""

    def __init__(self, sites: Collection[str]) -> None:
        self.by_site: dict[str, torch.Tensor] = {}
        self.time: torch.Tensor | None = None
        self._sites = {*sites, OUT}

    def active(self) -> bool:
        return True

    def tap(self, site: str, x: torch.Tensor) -> None:
        if site in self._sites:
            self.by_site[site] = x

    def tuned(self, site: str, x: torch.Tensor) -> torch.Tensor:
        self.tap(site, x)
        return x

    def see(self, *, time: torch.Tensor | None = None, text: torch.Tensor | None = None) -> None:
        if time is not None:
            self.time = time


@torch.no_grad()
def record_features(
    unet: Any, taps: Collection[str], noisy: torch.Tensor, timesteps: torch.Tensor, inputs: Mapping[str, Any]
) -> TapFeatures:
    """Run the base, without tuners, and return what a bypass reads of it.

    Args:
        unet: the base.
        taps: the sites to keep beside `out`.
        noisy: noisy latents `(batch, channels, height, width)`, in the base's dtype.
        timesteps: `(batch,)`.
        inputs: further keyword arguments of the base.
    """
    recorder = _Recorder(taps)
    handles = structure_of(unet).install(unet, recorder)
    try:
        unet(noisy, timesteps, return_dict=False, **inputs)
    finally:
        for handle in handles:
            handle.remove()
    assert recorder.time is not None
    return TapFeatures(recorder.by_site, recorder.time, (noisy.shape[-2], noisy.shape[-1]))


def predict_from_features(unet: Any, tuner: Tuner, features: TapFeatures) -> torch.Tensor:
    """Return what the base predicts with a bypass tuner; of the base only the output head runs.

    Args:
        unet: the base, to which no tuner needs to be attached.
        tuner: a tuner of a `bypass` part alone.
        features: in the base's dtype; their batch is that of the prediction.
    """
    (part,) = tuner.parts()
    out = features.by_site[OUT]
    residual = part(OUT, out, Features(dict(features.by_site), features.time, size=features.size))
    return run_head(unet, out + residual.to(out.dtype))
