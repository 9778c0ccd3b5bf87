"""Tuner attached to a base, with its weight, its condition images and its residuals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..backbones import BaseInfo, Site
from ..backbones.site_names import SiteName
from ..tuners import Features, Part
from ..tuners.tuner import Tuner
from ..utils.errors import ConditionError, RestuneError
from .mixing import ForwardContext, WeightBuffers, mask_at, row_factors
from .weights import TunerWeight


@dataclass
class Conditions:
    """Condition images of a tuner, and their encoded features."""

    images: list[torch.Tensor | None]
    weights: tuple[float, ...]
    encoded: tuple[dict[str, torch.Tensor], ...] | None = None
    """Features by site for each condition: computed in the first forward pass and reused for the same latent size; in
    training computed in every forward pass."""
    size: tuple[int, int] | None = None
    """Height and width of the latent for which the images were encoded."""
    of_one_pass: bool = False
    """Whether the features are valid for a single forward pass, because they require gradients."""


class Residual(NamedTuple):
    """Residual that a tuner adds to a feature, for all rows of the batch (`rows` is None) or for the given rows."""

    value: torch.Tensor
    rows: torch.Tensor | None

    @staticmethod
    def add(total: torch.Tensor, residuals: Sequence[Residual]) -> torch.Tensor:
        """Add residuals to a feature."""
        for residual in residuals:
            if residual.rows is None:
                total = total + residual.value.to(total.dtype)
        some = [(residual.rows, residual.value) for residual in residuals if residual.rows is not None]
        if not some:
            return total
        # A single addition: each one copies the whole batch, and there may be one tuner per image.
        rows, values = torch.cat([rows for rows, _ in some]), torch.cat([value for _, value in some])
        return total.index_add(0, rows, values.to(total.dtype))


class AttachedTuner:
    """Tuner that is attached to a base by a `TunerManager`.

    Args:
        tuner: the tuner.
        weight: weight of the tuner.
    """

    def __init__(self, tuner: Tuner, weight: TunerWeight) -> None:
        self.tuner = tuner
        self.sites = tuple(dict.fromkeys(site for part in tuner.parts() for site in part.writes))
        self.taps = frozenset(site for part in tuner.parts() for site in part.taps)
        self._described = {site: _described(site, tuner.base) for site in self.sites}
        self.conditions: Conditions | None = None
        self.weight_buffers = WeightBuffers(self.sites, tuner.device)
        self.set_weight(weight, self.site_factors(weight))

    def site_factors(self, weight: TunerWeight) -> dict[str, float]:
        """Return the factor of each site that the tuner writes to; raise `RestuneError` for an unknown pattern."""
        return weight.site_factors(self.sites)

    def set_weight(self, weight: TunerWeight, factors: dict[str, float]) -> None:
        """Set a validated weight with its factors by site."""
        self.weight = weight
        self.factors = factors
        self.weight_buffers.set(weight, factors)
        self._rows: torch.Tensor | None = None
        self._scale: float | torch.Tensor = weight.values[0]
        # A compiled graph depends on this flag and not on the weight, which would recompile it for each value.
        self.acts = weight.acts
        self._acts_now = weight.acts

    @property
    def takes_part(self) -> bool:
        """Whether the tuner is active in this forward pass; a schedule may disable it in some."""
        return self.acts if torch.compiler.is_compiling() else self._acts_now

    def begin(self, this: ForwardContext) -> None:
        """Compute the active rows and their factors, once per forward pass."""
        if torch.compiler.is_compiling():
            return
        factors = row_factors(self.weight, this) if self.weight.acts else (0.0,)
        self._acts_now = any(factors)
        self._rows, self._scale = None, factors[0]
        if len(factors) > 1:
            rows = [row for row, factor in enumerate(factors) if factor]
            self._rows = torch.tensor(rows, device=this.device)
            self._scale = torch.tensor([factors[row] for row in rows], device=this.device)

    def end(self) -> None:
        """Release the features that belong to this forward pass."""
        conditions = self.conditions
        if conditions is not None and conditions.of_one_pass:
            conditions.encoded, conditions.of_one_pass = None, False

    def set_conditions(self, images: Sequence[torch.Tensor | None], weights: Sequence[float] | None) -> None:
        """Set condition images; see `TunerManager.set_conditions`."""
        part = self._control
        if part is None:
            raise ConditionError("This tuner takes no condition images, because it has no `control` part.")
        names = part.conditions
        weights = [1.0] * len(names) if weights is None else weights
        if len(images) != len(names) or len(weights) != len(names):
            raise ConditionError(
                f"This tuner takes {len(names)} conditions ({', '.join(names)}), but {len(images)} images and "
                f"{len(weights)} weights are given."
            )
        if not all(map(math.isfinite, weights)):
            raise ConditionError(f"A condition's weight must be a finite number, but the weights are {list(weights)}.")
        self.conditions = Conditions(list(images), tuple(map(float, weights)))

    def swap(self, tuner: Tuner) -> None:
        """Overwrite the parameters with those of a tuner of the same config."""
        _check_same_config(tuner, self.tuner)
        tuner.base.check_fits(self.tuner.base)
        tuner.base.check_text_fits(self.tuner.base.text)
        with torch.no_grad():
            for mine, other in zip(self.tuner.parameters(), tuner.parameters(), strict=True):
                mine.copy_(other)
        self.tuner.metadata = dict(tuner.metadata)
        if self.conditions is not None and self.conditions.size is not None:
            self.encode_conditions(self.conditions.size)

    def place(self, device: torch.device) -> None:
        """Move the tuner, and the tensors from which a compiled graph reads its weight, to a device."""
        if self.tuner.device != device:
            self.tuner.to(device)
            self.weight_buffers.to(device)

    @torch.no_grad()
    def encode_conditions(self, size: tuple[int, int]) -> None:
        """Encode the condition images, if there are any, for latents of height and width `size`."""
        part = self._control
        if self.conditions is not None and part is not None:
            device = self.tuner.device
            images = [None if image is None else image.to(device) for image in self.conditions.images]
            self.conditions.encoded, self.conditions.size = part.encode(images, size), size
            self.conditions.of_one_pass = False

    def residuals(self, site: str, x: torch.Tensor, features: Features, this: ForwardContext) -> list[Residual]:
        """Return the weighted residuals of the tuner's parts for the feature `x`."""
        compiling = torch.compiler.is_compiling()
        if not compiling and self.factors[site] == 0:
            return []
        self.place(x.device)
        made = self._on_all_rows if compiling else self._on_acting_rows
        with self.tuner.precision(x.device):
            return [
                made(part, site, x, self._with_conditions(part, site, features, this), this)
                for part in self.tuner.parts()
                if site in part.writes
            ]

    def _on_all_rows(
        self, part: Part, site: str, x: torch.Tensor, features: Features, this: ForwardContext
    ) -> Residual:
        """Run a part on all rows, with factors that a compiled graph reads from a tensor."""
        residual = part(site, x, features)
        factors = (
            self.weight_buffers.factors(site, self.weight, this).to(x.device).view(-1, *[1] * (residual.dim() - 1))
        )
        return Residual(self._masked(site, residual * factors, this), None)

    def _on_acting_rows(
        self, part: Part, site: str, x: torch.Tensor, features: Features, this: ForwardContext
    ) -> Residual:
        """Run a part on the active rows only."""
        factor, rows = self.factors[site], self._rows
        if rows is None:
            residual = self._masked(site, part(site, x, features), this)
            assert isinstance(self._scale, float)
            scale = self._scale * factor
            return Residual(residual if scale == 1 else residual * scale, None)
        assert isinstance(self._scale, torch.Tensor)
        residual = part(site, x[rows], features.rows(rows))
        scales = (self._scale * factor).view(-1, *[1] * (residual.dim() - 1))
        return Residual(self._masked(site, residual, this, rows) * scales, rows)

    def _masked(
        self, site: str, residual: torch.Tensor, this: ForwardContext, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.weight.mask is None:
            return residual
        mask = mask_at(self.weight, self._described[site], residual, this)
        assert mask is not None
        return residual * (mask[rows] if rows is not None and len(mask) > 1 else mask)

    @property
    def _control(self) -> Part | None:
        return next((part for part in self.tuner.parts() if part.conditions), None)

    def _with_conditions(self, part: Part, site: str, features: Features, this: ForwardContext) -> Features:
        """Add the features of the condition images to those of a control part, one row per row of the batch."""
        if not part.conditions:
            return features
        if self.conditions is None:
            # The part itself raises the error for missing images.
            return features
        conditions = self.conditions
        if conditions.encoded is None or conditions.size != this.size:
            images = [None if image is None else image.to(this.device) for image in conditions.images]
            conditions.encoded, conditions.size = part.encode(images, this.size), this.size
            conditions.of_one_pass = any(
                level.requires_grad for levels in conditions.encoded for level in levels.values()
            )
        tiled = tuple({site: _tiled(levels[site], this)} if levels else {} for levels in conditions.encoded)
        return features.given(tiled, conditions.weights)


def _check_same_config(new: Tuner, old: Tuner) -> None:
    """Raise `RestuneError` with the first difference between two tuners' configs, if there is one."""
    remedy = "only a tuner with the same config can replace it; delete the loaded tuner and load the new one"
    parts = [[config.part for config in tuner.configs] for tuner in (old, new)]
    if parts[0] != parts[1]:
        raise RestuneError(f"The loaded tuner has the parts {parts[0]}, the new one {parts[1]}; {remedy}.")
    for ours, theirs in zip(old.configs, new.configs, strict=True):
        for key, value in ours:
            if getattr(theirs, key) != value:
                raise RestuneError(
                    f"The loaded tuner's `{ours.part}` part has {key} = {value!r}, the new one's {key} = "
                    f"{getattr(theirs, key)!r}; {remedy}."
                )


def _tiled(features: torch.Tensor, this: ForwardContext) -> torch.Tensor:
    """Repeat the features of condition images to one row per row at a site."""
    features, layout = features.to(this.device), this.layout
    if len(features) > 1 and layout is not None:
        if layout.images % len(features) or len(features) % layout.prompts:
            raise ConditionError(_miscounted(len(features), layout.images))
        # The images of a prompt are adjacent.
        features = features.repeat_interleave(layout.images // len(features), 0)
    if this.rows % len(features):
        raise ConditionError(_miscounted(len(features), this.rows))
    tiled = features.repeat(this.rows // len(features), 1, 1, 1)
    return tiled if this.frames == 1 else tiled.repeat_interleave(this.frames, 0)


def _miscounted(condition_images: int, images: int) -> str:
    return f"There are {condition_images} condition images for {images} images; give one, or one per image."


def _described(site: str, base: BaseInfo) -> Site:
    """Return the description of a site; for a linear layer's site that of its operation."""
    return base.sites.get(site) or base.sites[SiteName.parse(site).operation_site]
