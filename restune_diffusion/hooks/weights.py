"""How strongly a tuner acts: a number, or one that differs by image, site, denoising step, region or guidance half."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch

from ..backbones.site_names import SitePattern
from ..utils.errors import RestuneError

_PIECE = re.compile(r"(?P<start>[\d.]+)\s*-\s*(?P<end>[\d.]+)\s*:\s*(?P<first>-?[\d.]+)(?:\s*>\s*(?P<last>-?[\d.]+))?")
ROUNDING = 1e-6
"""A time step of exactly a piece's start belongs to it, although its progress is a rounded number."""


Value: TypeAlias = float | torch.Tensor


@dataclass(frozen=True)
class Schedule:
    """A factor over the course of denoising; make one with `schedule`.

    Progress runs from 0, the noisiest time step of the training, to 1. A step of the sampler has the progress
    `1 - (t + 1) / T` of its time step `t`, so a schedule means the same for any number of steps and any strength of
    image-to-image.

    Args:
        pieces: `(start, end, first, last)` with the factor going from `first` at `start` to `last` at `end`; an end
            belongs to the next piece, but for 1. Where there is no piece, the factor is zero.
    """

    pieces: tuple[tuple[float, float, float, float], ...]

    def __post_init__(self) -> None:
        for start, end, *factors in self.pieces:
            if not 0 <= start < end <= 1 or not all(map(math.isfinite, factors)):
                raise RestuneError(
                    f"A piece of a schedule needs 0 <= start < end <= 1 and finite factors, but has {start}-{end}: "
                    f"{factors}."
                )

    def at(self, progress: float) -> float:
        """Return the factor at a progress in [0, 1]; of pieces that overlap, the first counts."""
        for start, end, first, last in self.pieces:
            if piece_holds(progress, start, end):
                return piece_factor(progress, start, end - start, first, last)
        return 0.0

    def disjoint(self) -> list[tuple[float, float, float, float, float, float]]:
        """Return the stretches on which each piece decides, none of which overlap.

        Returns:
            `(from, to, start, length, first, last)` of each stretch, with start and length of the whole piece.
        """
        stretches = []
        for number, (start, end, first, last) in enumerate(self.pieces):
            free = [(start, end)]
            for low, high in (piece[:2] for piece in self.pieces[:number]):
                both = [side for a, b in free for side in ((a, min(b, low)), (max(a, high), b))]
                free = [(a, b) for a, b in both if a < b]
            stretches += [(a, b, start, end - start, first, last) for a, b in free]
        return stretches


# The equations of a weight. Each is written with operators that numbers and tensors both have: an eager pass evaluates
# them on Python numbers, a compiled graph on the tensors of a `WeightBuffers`.


def piece_holds(progress: Value, start: Value, end: Value) -> Any:
    """Return whether a piece of a schedule holds at a progress: from its start to before its end, or through 1."""
    return ((progress >= start - ROUNDING) & (progress < end - ROUNDING)) | ((progress >= 1 - ROUNDING) & (end == 1))


def piece_factor(progress: Value, start: Value, length: Value, first: Value, last: Value) -> Any:
    """Return the factor of a piece of a schedule at a progress: a line from `first` to `last`."""
    return first + (last - first) * (progress - start) / length


def row_factor(value: Value, half: Value, step: Value) -> Any:
    """Return the factor of a row of the batch.

    Args:
        value: the weight's value for the row's image.
        half: 1 for a row of the half of guidance that the tuner acts on, or 0.
        step: the schedule's factor.
    """
    return value * half * step


def schedule(text: str) -> Schedule:
    """Read a schedule: `"0.0-0.3: 0, 0.3-1.0: 1"`, or `"0.2-0.6: 0>1, 0.6-1: 1"` with a linear ramp.

    Args:
        text: pieces `start-end: factor` or `start-end: first>last`, with commas between them; where there is none,
            the factor is zero. Progress 0 is pure noise, 1 the finished image.

    Raises:
        RestuneError: if the text has another form; names the piece.
    """
    pieces = []
    for piece in text.split(","):
        match = _PIECE.fullmatch(piece.strip())
        try:
            start, end, first, last = map(float, match.groups(default=match["first"]) if match else ())
        except ValueError:
            raise RestuneError(
                f"`{piece.strip()}` is no piece of a schedule; write for instance `0.0-0.3: 0, 0.3-1.0: 1`."
            ) from None
        pieces.append((start, end, first, last))
    return Schedule(tuple(pieces))


@dataclass(frozen=True)
class TunerWeight:
    """All that decides how strongly a tuner acts; the factors multiply.

    Args:
        value: one number, or one for each image of a batch.
        sites: factors by pattern of sites, for instance `{"skip.0-3": 0.2, "up.*.ff": 0}`; of several patterns that
            match, the last counts, and a site that none matches keeps 1.
        steps: factor over the denoising steps.
        mask: where the tuner acts, in [0, 1], `(height, width)` in any resolution, or one for each image,
            `(images, height, width)`.
        on: which half of classifier-free guidance the tuner sees.
    """

    value: float | tuple[float, ...] = 1.0
    sites: Mapping[str, float] = field(default_factory=dict)
    steps: Schedule | None = None
    mask: torch.Tensor | None = field(default=None, compare=False)
    on: Literal["both", "cond", "uncond"] = "both"
    count: int = field(default=1, init=False, repr=False, compare=False)
    """Number of values; stored, so that a compiled graph that reads it does not depend on the values themselves."""

    def __post_init__(self) -> None:
        values = self.value if isinstance(self.value, Sequence) else (self.value,)
        numbers = tuple(map(float, values))
        if not numbers or not all(map(math.isfinite, (*numbers, *self.sites.values()))):
            raise RestuneError(
                f"A tuner's weight must be a finite number, or one for each image, but is {self.value} "
                f"with {dict(self.sites)}."
                if self.sites
                else f"A tuner's weight must be a finite number, or one for each image, but is {self.value}."
            )
        object.__setattr__(self, "value", numbers if isinstance(self.value, Sequence) else numbers[0])
        object.__setattr__(self, "count", len(numbers))
        if self.on not in ("both", "cond", "uncond"):
            raise RestuneError(f"A tuner acts on `both`, `cond` or `uncond`, not on {self.on!r}.")
        if self.mask is not None:
            _check_mask(self.mask)

    @property
    def values(self) -> tuple[float, ...]:
        """The value as a tuple, of one number where it is the same for all images."""
        return self.value if isinstance(self.value, tuple) else (self.value,)

    @property
    def acts(self) -> bool:
        """Whether it is other than zero for at least one image."""
        return any(self.values)

    def plain(self) -> float | tuple[float, ...] | TunerWeight:
        """Return the value alone, where nothing else is set."""
        return self.value if self == TunerWeight(self.value) and self.mask is None else self

    def site_factors(self, sites: Iterable[str]) -> dict[str, float]:
        """Return the factor of each site.

        Raises:
            RestuneError: if a pattern matches none of the sites; names the valid ones.
        """
        names = list(sites)
        factors = dict.fromkeys(names, 1.0)
        for pattern, factor in self.sites.items():
            matched = SitePattern(pattern).select(names)
            if not matched:
                raise RestuneError(f"No site of the tuner matches `{pattern}`; it acts on {', '.join(names)}.")
            factors.update(dict.fromkeys(matched, float(factor)))
        return factors


Weight: TypeAlias = float | Sequence[float] | Mapping[str, float] | Schedule | TunerWeight
"""How strongly a tuner acts: a number, one for each image, factors by site pattern, a schedule, or all of these."""


def as_weight(weight: Weight | str) -> TunerWeight:
    """Write any form of weight as a `TunerWeight`.

    Raises:
        RestuneError: if it is not finite, empty, or of another form.
    """
    if isinstance(weight, TunerWeight):
        return weight
    if isinstance(weight, Schedule):
        return TunerWeight(steps=weight)
    if isinstance(weight, str):
        raise RestuneError(f"{weight!r} is no weight; write schedule({weight!r}) for one over the steps.")
    if isinstance(weight, Mapping):
        return TunerWeight(sites=dict(weight))
    return TunerWeight(float(weight)) if isinstance(weight, int | float) else TunerWeight(tuple(weight))


def _check_mask(mask: torch.Tensor) -> None:
    if mask.dim() not in (2, 3) or not mask.is_floating_point() or 0 in mask.shape:
        raise RestuneError(
            f"A mask must be a floating point tensor (height, width) or (images, height, width), but is "
            f"{mask.dtype} of shape {tuple(mask.shape)}."
        )
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise RestuneError("A mask must lie between 0 and 1.")
