"""Weights of tuners: a number, or factors by image, site, denoising step, region and guidance branch."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch

from ..backbones.site_names import SitePattern
from ..utils.errors import RestuneError

logger = logging.getLogger(__name__)

_PIECE = re.compile(r"(?P<start>[\d.]+)\s*-\s*(?P<end>[\d.]+)\s*:\s*(?P<first>-?[\d.]+)(?:\s*>\s*(?P<last>-?[\d.]+))?")
# Well above every weight that images survive, so that no extrapolation on purpose warns.
_LARGE = 10.0
ROUNDING = 1e-6
"""Tolerance with which a timestep at exactly a segment's start belongs to it, despite rounding of its progress."""


Value: TypeAlias = float | torch.Tensor


@dataclass(frozen=True)
class Schedule:
    """Piecewise linear factor over the progress of denoising; see `schedule` for its text form.

    Progress runs from 0, the noisiest training timestep, to 1. A sampling step at timestep `t` of `T` has the progress
    `1 - (t + 1) / T`, so a schedule is independent of the number of steps and of the image-to-image strength.

    Args:
        pieces: segments `(start, end, first, last)` with a factor from `first` at `start` to `last` at `end`; an end
            belongs to the next segment, except 1. Outside all segments the factor is zero.
    """

    pieces: tuple[tuple[float, float, float, float], ...]

    def __post_init__(self) -> None:
        for start, end, *factors in self.pieces:
            if not 0 <= start < end <= 1 or not all(map(math.isfinite, factors)):
                raise RestuneError(
                    f"A schedule segment needs 0 <= start < end <= 1 and finite factors, but has {start}-{end}: "
                    f"{factors}."
                )

    def at(self, progress: float) -> float:
        """Return the factor at a progress in [0, 1]; the first of overlapping segments applies."""
        for start, end, first, last in self.pieces:
            if piece_holds(progress, start, end):
                return piece_factor(progress, start, end - start, first, last)
        return 0.0

    def disjoint(self) -> list[tuple[float, float, float, float, float, float]]:
        """Return the disjoint intervals in which each segment applies.

        Returns:
            `(from, to, start, length, first, last)` of each interval, with start and length of its whole segment.
        """
        intervals = []
        for number, (start, end, first, last) in enumerate(self.pieces):
            free = [(start, end)]
            for low, high in (piece[:2] for piece in self.pieces[:number]):
                both = [side for a, b in free for side in ((a, min(b, low)), (max(a, high), b))]
                free = [(a, b) for a, b in both if a < b]
            intervals += [(a, b, start, end - start, first, last) for a, b in free]
        return intervals


# Equations of a weight, with operators that both numbers and tensors support: an eager pass evaluates them on Python
# numbers, a compiled graph on the tensors of `WeightBuffers`.


def piece_holds(progress: Value, start: Value, end: Value) -> Any:
    """Return whether a segment applies at a progress: from its start to before its end, including 1."""
    return ((progress >= start - ROUNDING) & (progress < end - ROUNDING)) | ((progress >= 1 - ROUNDING) & (end == 1))


def piece_factor(progress: Value, start: Value, length: Value, first: Value, last: Value) -> Any:
    """Return the factor of a segment at a progress, linear from `first` to `last`."""
    return first + (last - first) * (progress - start) / length


def row_factor(value: Value, half: Value, step: Value) -> Any:
    """Return the factor of a row of the batch.

    Args:
        value: the weight's value for the row's image.
        half: 1 for a row of the guidance branch that the tuner acts on, 0 otherwise.
        step: factor of the schedule.
    """
    return value * half * step


def schedule(text: str) -> Schedule:
    """Parse a schedule, e.g. `"0.0-0.3: 0, 0.3-1.0: 1"`, or `"0.2-0.6: 0>1, 0.6-1: 1"` with a linear ramp.

    Args:
        text: comma-separated segments `start-end: factor` or `start-end: first>last`; outside all segments the factor
            is zero. Progress 0 is pure noise, 1 the finished image.

    Raises:
        RestuneError: if a segment is invalid; the message quotes it.
    """
    pieces = []
    for piece in text.split(","):
        match = _PIECE.fullmatch(piece.strip())
        try:
            start, end, first, last = map(float, match.groups(default=match["first"]) if match else ())
        except ValueError:
            raise RestuneError(
                f"Invalid schedule segment `{piece.strip()}`; expected `start-end: factor` or "
                "`start-end: first>last`, for example `0.0-0.3: 0, 0.3-1.0: 1`."
            ) from None
        pieces.append((start, end, first, last))
    return Schedule(tuple(pieces))


@dataclass(frozen=True)
class TunerWeight:
    """Weight of a tuner by image, site, denoising step, region and guidance branch; the factors multiply.

    Args:
        value: one number, or one per image of a batch.
        sites: factors by site pattern, e.g. `{"skip.0-3": 0.2, "up.*.ff": 0}`; the last matching pattern applies, and
            sites without a match have factor 1.
        steps: factor over the denoising steps.
        mask: spatial mask with values in [0, 1], floating point `(height, width)` in any resolution, or one per image,
            `(images, height, width)`.
        on: branch of classifier-free guidance that the tuner acts on.

    Raises:
        RestuneError: if a number is not finite, or `mask` or `on` is invalid.
    """

    value: float | tuple[float, ...] = 1.0
    sites: Mapping[str, float] = field(default_factory=dict)
    steps: Schedule | None = None
    mask: torch.Tensor | None = field(default=None, compare=False)
    on: Literal["both", "cond", "uncond"] = "both"
    count: int = field(default=1, init=False, repr=False, compare=False)
    """Number of values; stored so that a compiled graph reads the count without depending on the values."""

    def __post_init__(self) -> None:
        values = self.value if isinstance(self.value, Sequence) else (self.value,)
        numbers = tuple(map(float, values))
        if not numbers or not all(map(math.isfinite, (*numbers, *self.sites.values()))):
            raise RestuneError(
                f"A tuner's weight must be a finite number, or one per image, but is {self.value} "
                f"with {dict(self.sites)}."
                if self.sites
                else f"A tuner's weight must be a finite number, or one per image, but is {self.value}."
            )
        object.__setattr__(self, "value", numbers if isinstance(self.value, Sequence) else numbers[0])
        object.__setattr__(self, "count", len(numbers))
        if self.on not in ("both", "cond", "uncond"):
            raise RestuneError(f"A weight's `on` must be `both`, `cond` or `uncond`, but is {self.on!r}.")
        if self.mask is not None:
            _check_mask(self.mask)

    @property
    def values(self) -> tuple[float, ...]:
        """The value as a tuple; a single number applies to all images."""
        return self.value if isinstance(self.value, tuple) else (self.value,)

    @property
    def acts(self) -> bool:
        """Whether the weight is nonzero for at least one image."""
        return any(self.values)

    def plain(self) -> float | tuple[float, ...] | TunerWeight:
        """Return only the value if nothing else is set, otherwise the weight itself."""
        return self.value if self == TunerWeight(self.value) and self.mask is None else self

    def site_factors(self, sites: Iterable[str]) -> dict[str, float]:
        """Return the factor of each site.

        Raises:
            RestuneError: if a pattern matches none of the sites; the message lists the sites.
        """
        names = list(sites)
        factors = dict.fromkeys(names, 1.0)
        for pattern, factor in self.sites.items():
            matched = SitePattern(pattern).select(names)
            if not matched:
                raise RestuneError(f"No site of the tuner matches `{pattern}`; its sites are {', '.join(names)}.")
            factors.update(dict.fromkeys(matched, float(factor)))
        return factors


Weight: TypeAlias = float | Sequence[float] | Mapping[str, float] | Schedule | TunerWeight
"""Weight of a tuner: a number, one number per image, factors by site pattern, a schedule, or a `TunerWeight`."""


def as_weight(weight: Weight | str) -> TunerWeight:
    """Convert any form of weight to a `TunerWeight`.

    Raises:
        RestuneError: if the weight is empty, not finite, or of an invalid type.
    """
    if isinstance(weight, TunerWeight):
        return weight
    if isinstance(weight, Schedule):
        return TunerWeight(steps=weight)
    if isinstance(weight, str):
        raise RestuneError(f"{weight!r} is not a weight; pass schedule({weight!r}) for a schedule over the steps.")
    if isinstance(weight, Mapping):
        return TunerWeight(sites=dict(weight))
    return TunerWeight(float(weight)) if isinstance(weight, int | float) else TunerWeight(tuple(weight))


def warn_of_large(name: str, weight: TunerWeight) -> None:
    """Log a warning about a weight so large that images usually fall apart."""
    largest = max(map(abs, weight.values))
    if largest > _LARGE:
        logger.warning(
            "The weight %g of the tuner %s is far beyond the usual range from 0 to 2; images usually fall apart.",
            largest,
            name,
        )


def _check_mask(mask: torch.Tensor) -> None:
    if mask.dim() not in (2, 3) or not mask.is_floating_point() or 0 in mask.shape:
        raise RestuneError(
            f"A mask must be a floating point tensor (height, width) or (images, height, width), but is "
            f"{mask.dtype} of shape {tuple(mask.shape)}."
        )
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise RestuneError("The values of a mask must be between 0 and 1.")
