"""What a bypass reads of the base: all that its training needs, as no gradient enters the base's blocks.

A bypass writes at the output head alone. So the base's features are the same whatever the bypass has learnt: they may
come from a pass that serves several tuners, or from a disk, and what remains is the bypass itself and the head.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...backbones import structure_of
from ...backbones.site_names import OUT
from ...hooks.manager import TunerManager
from ...tuners import Features
from ...tuners.tuner import Tuner
from ...utils.errors import RestuneError


@dataclass(frozen=True)
class TapFeatures:
    """What one pass of the base showed to a bypass.

    `by_site` holds `(batch, channels, height, width)`, or `(batch, tokens, channels)` of a transformer, of each tapped
    site and of `out`. `time` is the time embedding `(batch, channels)` before its activation, None of a base without
    one, and `size` height and width of what the base was called on, in the unit of the sites' strides.
    """

    by_site: Mapping[str, torch.Tensor]
    time: torch.Tensor | None
    size: tuple[int, int]

    def to(self, device: torch.device, dtype: torch.dtype) -> TapFeatures:
        """Return the same on a device and in a dtype."""
        by_site = {site: feature.to(device, dtype) for site, feature in self.by_site.items()}
        time = None if self.time is None else self.time.to(device, dtype)
        return replace(self, by_site=by_site, time=time)


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
def record_features(base: Any, taps: Collection[str], *args: Any, **kwargs: Any) -> TapFeatures:
    """Run the base, without tuners, and return what a bypass reads of it.

    Args:
        base: the base; no tuner may act on it.
        taps: the sites to keep beside `out`.
        *args: positional arguments of the base's forward.
        **kwargs: its keyword arguments.

    Raises:
        RestuneError: if a tuner acts on the base.
    """
    manager = TunerManager.of(base)
    if manager is not None and manager.active_names:
        raise RestuneError(
            f"Features are recorded of the base alone, but {', '.join(manager.active_names)} act on it; detach them, "
            f"or give them weight zero."
        )
    structure, recorder = structure_of(base), _Recorder(taps)
    handles = structure.install(base, recorder)
    try:
        base(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return TapFeatures(recorder.by_site, recorder.time, structure.call(base, args, kwargs).size)


def predict_from_features(base: Any, tuner: Tuner, features: TapFeatures) -> torch.Tensor:
    """Return what the base makes with a bypass tuner; of the base only the output head runs.

    The features of one pass serve any number of tuners. Each has a pass of its own through the head, of the size that
    it has alone, so that the result equals that of the tuner attached, of weight 1, to the last bit.

    Args:
        base: the base, to which no tuner needs to be attached.
        tuner: a tuner of a `bypass` part alone.
        features: in the base's dtype; their batch is that of the prediction.

    Returns:
        The prediction of a U-Net, `(batch, channels, height, width)`, or the last hidden state of a `ViTModel`.

    Raises:
        RestuneError: if the tuner has another part, or the base's head needs more than the features.
    """
    parts = list(tuner.parts())
    if [part.writes for part in parts] != [(OUT,)]:
        kinds = ", ".join(config.part for config in tuner.configs)
        raise RestuneError(
            f"Only a tuner of one part that writes at `{OUT}` alone, such as `bypass`, works on recorded features, "
            f"but this has {kinds}; attach the tuner and run the whole base."
        )
    out = features.by_site[OUT]
    residual = parts[0](OUT, out, Features(dict(features.by_site), features.time, size=features.size))
    return structure_of(base).run_head(base, out + residual.to(out.dtype))
