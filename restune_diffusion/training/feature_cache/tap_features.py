"""Features of the base that a bypass tuner reads.

A bypass writes only at the output head, so the base's features do not depend on it and need no gradient. They can come
from a forward pass shared by several tuners or from disk. Only the bypass and the output head then run.
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
from ..transfers.to_device import to_device


@dataclass(frozen=True)
class TapFeatures:
    """Features of one forward pass of the base that a bypass reads.

    `by_site` holds `(batch, channels, height, width)`, or `(batch, tokens, channels)` of a transformer, of each tapped
    site and of `out`. `time` is the time embedding `(batch, channels)` before its activation, None for a base without
    one. `size` is the height and width of the base's input, in the unit of the sites' strides.
    """

    by_site: Mapping[str, torch.Tensor]
    time: torch.Tensor | None
    size: tuple[int, int]

    def to(self, device: torch.device, dtype: torch.dtype) -> TapFeatures:
        """Return a copy on a device and in a dtype."""
        by_site = {site: to_device(feature, device, dtype) for site, feature in self.by_site.items()}
        time = None if self.time is None else to_device(self.time, device, dtype)
        return replace(self, by_site=by_site, time=time)


class _Recorder:
    """Hook target that stores features and changes nothing."""

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
    """Run the base without tuners, and return the features that a bypass reads.

    Args:
        base: the base; no tuner may be active on it.
        taps: sites to store in addition to `out`.
        *args: positional arguments of the base's forward.
        **kwargs: keyword arguments of the base's forward.

    Raises:
        RestuneError: if a tuner is active on the base.
    """
    manager = TunerManager.of(base)
    if manager is not None and manager.active_names:
        raise RestuneError(
            f"Features are recorded with all tuners disabled, but these are active: "
            f"{', '.join(manager.active_names)}; detach them, or set their weights to 0."
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
    """Return the prediction of the base with a bypass tuner; only the output head of the base runs.

    The features of one forward pass can be used by any number of tuners. Each has its own forward pass through the
    head, so that the result equals that of the attached tuner with weight 1 to the last bit.

    Args:
        base: the base; the tuner need not be attached.
        tuner: a tuner with a `bypass` part only.
        features: features in the base's dtype, with the batch size of the prediction.

    Returns:
        The prediction of a U-Net, `(batch, channels, height, width)`, or the last hidden state of a `ViTModel`.

    Raises:
        RestuneError: if the tuner has another part, or the base's head needs inputs other than the features.
    """
    parts = list(tuner.parts())
    if [part.writes for part in parts] != [(OUT,)]:
        families = ", ".join(config.part for config in tuner.configs)
        raise RestuneError(
            f"Only a tuner of one part that writes at `{OUT}` alone, such as `bypass`, works on recorded features, "
            f"but this one has {families}; attach the tuner and run the whole base."
        )
    out = features.by_site[OUT]
    with tuner.precision(out.device):
        residual = parts[0](OUT, out, Features(dict(features.by_site), features.time, size=features.size))
    return structure_of(base).run_head(base, out + residual.to(out.dtype))
