"""Tuner attached to a base, with its weight, its condition images and its residuals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from ..backbones import BaseInfo, Site
from ..backbones.site_names import SiteName
from ..tuners import Features, Part
from ..tuners.tuner import Tuner
from ..utils.devices import overwrite_all, sent
from ..utils.errors import ConditionError, RestuneError
from .conditions import ConditionFeatures, Conditions
from .mixing import ActiveRows, ForwardContext, mask_at, row_factors
from .weight_buffers import WeightBuffers
from .weights import TunerWeight

Residual: TypeAlias = tuple[torch.Tensor, torch.Tensor | None]
"""Residual that a tuner adds to a feature, and the rows of the batch that it is for; None for all rows."""


class AttachedTuner:
    """Tuner that is attached to a base by a `TunerManager`.

    Args:
        tuner: the tuner.
        weight: weight of the tuner.
    """

    def __init__(self, tuner: Tuner, weight: TunerWeight) -> None:
        self.tuner = tuner
        self.parts_at: dict[str, tuple[Part, ...]] = {}
        """Parts that write to a site, by site."""
        for part in tuner.parts():
            for site in dict.fromkeys(part.writes):
                self.parts_at[site] = (*self.parts_at.get(site, ()), part)
        self.sites = tuple(self.parts_at)
        self.taps = frozenset(site for part in tuner.parts() for site in part.taps)
        # Numbers, because dynamo of torch 2.11 cannot trace the look-up in a pydantic model.
        self._strides = {site: _described(site, tuner.base).stride for site in self.sites}
        self.conditions: Conditions | None = None
        self._features = ConditionFeatures()
        self.weight_buffers = WeightBuffers(self.sites, tuner.device)
        self.placed: torch.device | None = None
        """Device on which the tuner is known to be; None before the first feature of a forward pass."""
        self.set_weight(weight, self.site_factors(weight))
        tuner.add_follower(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copied tuner does not know who follows the original.
        self.__dict__.update(state)
        self.tuner.add_follower(self)

    def site_factors(self, weight: TunerWeight) -> dict[str, float]:
        """Return the factor of each site that the tuner writes to; raise `RestuneError` for an unknown pattern."""
        return weight.site_factors(self.sites)

    def set_weight(self, weight: TunerWeight, factors: dict[str, float]) -> None:
        """Set a validated weight with its factors by site."""
        self.weight = weight
        self.factors = factors
        self.weight_buffers.set(weight, factors)
        self._masks: dict[tuple[Any, ...], torch.Tensor] = {}
        self._mix: tuple[tuple[float, ...], torch.device] | None = None
        self._row_factors: dict[float, tuple[float, ...]] = {}
        self._rows: ActiveRows | None = None
        self._scale = weight.values[0]
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
        self.placed = None
        factors = row_factors(self.weight, this) if self.weight.acts else (0.0,)
        self._acts_now = any(factors)
        self._scale = factors[0]
        if (factors, this.device) != self._mix:
            # Kept from pass to pass, because every tensor here is a copy from the host.
            with torch.inference_mode(False):
                self._rows = ActiveRows(factors, this.device) if len(factors) > 1 else None
            self._mix = factors, this.device
            self._row_factors.clear()

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
        overwrite_all(zip(self.tuner.parameters(), tuner.parameters(), strict=True))
        self.tuner.metadata = dict(tuner.metadata)
        if self.conditions is not None and self.conditions.size is not None:
            self.encode_conditions(self.conditions.size)

    def place(self, device: torch.device) -> None:
        """Move the tuner, and the tensors from which a compiled graph reads its weight, to a device."""
        if self.tuner.device != device:
            self.tuner.to(device)
        self.placed = device

    def follow(self, device: torch.device) -> None:
        """Move the tuner to a device, unless this forward pass has already done so."""
        if device != self.placed:
            self.place(device)

    def factors_at(self, site_factor: float | None) -> tuple[float, ...]:
        """Return the factor of each row at a site in this forward pass, or a single one if all are equal."""
        assert site_factor is not None
        found = self._row_factors.get(site_factor)
        if found is None:
            assert self._mix is not None
            found = self._row_factors[site_factor] = tuple(factor * site_factor for factor in self._mix[0])
        return found

    def tuner_moved(self) -> None:
        """Move the tensors of the weight to the tuner; called by the tuner after `Tuner.to`."""
        self.placed = None
        self._masks.clear()
        self.weight_buffers.to(self.tuner.device)

    @torch.no_grad()
    def encode_conditions(self, size: tuple[int, int]) -> None:
        """Encode the condition images, if there are any, for latents of height and width `size`."""
        part = self._control
        if self.conditions is not None and part is not None:
            device = self.tuner.device
            images = [None if image is None else sent(image, device) for image in self.conditions.images]
            self._features.store(self.conditions, part.encode(images, size))
            self.conditions.size = size
            self.conditions.of_one_pass = False

    def residual(
        self, part: Part, site: str, factor: float, x: torch.Tensor, features: Features, this: ForwardContext
    ) -> Residual:
        """Return the weighted residual of a part for the feature `x`, of the active rows only.

        Args:
            part: one of `parts_at` the site.
            site: name of the site.
            factor: factor of the site.
            x: the feature.
            features: other features of the forward pass.
            this: context of the forward pass.
        """
        self.follow(x.device)
        if part.conditions:
            features = self._with_conditions(part, site, features, this)
        rows, masked = self._rows, self.weight.mask is not None
        if rows is None:
            residual = self._run(part, site, x, features)
            if masked:
                residual = residual * self._mask(site, residual, this)
            scale = self._scale * factor
            return residual if scale == 1 else residual * scale, None
        residual = self._run(part, site, x[rows.numbers], features.rows(rows.numbers))
        if masked:
            mask = self._mask(site, residual, this)
            residual = residual * (mask[rows.numbers] if len(mask) > 1 else mask)
        return residual * rows.factors(factor, residual.dim()), rows.numbers

    def traced_residual(
        self, part: Part, site: str, x: torch.Tensor, features: Features, this: ForwardContext
    ) -> torch.Tensor:
        """Return the weighted residual of a part on all rows, with factors that a compiled graph reads from a tensor.

        A graph can neither move the tuner nor select rows.
        """
        residual = self._run(part, site, x, self._with_conditions(part, site, features, this))
        factors = (
            self.weight_buffers.factors(site, self.weight, this).to(x.device).view(-1, *[1] * (residual.dim() - 1))
        )
        residual = residual * factors
        mask = self.weight_buffers.mask
        if mask is not None:
            residual = residual * mask_at(self.weight, mask.to(x.device), self._strides[site], residual, this)
        return residual

    def _run(self, part: Part, site: str, x: torch.Tensor, features: Features) -> torch.Tensor:
        if self.tuner.autocast is None:
            unweighted: torch.Tensor = part(site, x, features)
            return unweighted
        with self.tuner.precision(x.device):
            cast: torch.Tensor = part(site, x, features)
            return cast

    def _mask(self, site: str, residual: torch.Tensor, this: ForwardContext) -> torch.Tensor:
        """Return the mask at a site, which is resized once for all sites of a size, and all passes."""
        stride, mask = self._strides[site], self.weight_buffers.mask
        assert mask is not None
        grid = residual.shape[2:] if residual.dim() == 4 else (*this.size, stride, residual.shape[1])
        key = grid, residual.dim(), residual.device, this.rows, this.frames, this.layout
        if key not in self._masks:
            with torch.inference_mode(False):
                self._masks[key] = mask_at(self.weight, mask.to(residual.device), stride, residual, this)
        return self._masks[key]

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
            # A graph cannot pin memory.
            move = torch.Tensor.to if torch.compiler.is_compiling() else sent
            images = [None if image is None else move(image, this.device) for image in conditions.images]
            with self.tuner.precision(this.device):
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
