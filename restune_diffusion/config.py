"""Typed, validated settings of each part of a tuner; they are stored in the tuner's file as JSON."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from .errors import RestuneError


class _PartConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SkipConfig(_PartConfig):
    """SC-Tuner on the skip connections of a U-Net (SCEdit, arXiv 2312.11392).

    `O_j = x_j + W_up GELU(W_down x_j)` at every position of every selected skip feature.
    """

    part: Literal["skip"] = "skip"
    ratio: float = Field(default=1.0, gt=0, le=8)
    """Width of the bottleneck over the width of the skip feature."""
    sites: tuple[str, ...] = ("skip.*",)
    """Patterns of the sites that get a tuner, as `fnmatch` reads them."""


class BypassConfig(_PartConfig):
    """Res-Tuning-Bypass: a side network that reads detached features and writes at the U-Net's output head.

    `b_l = lam_l * H_l(sg(x_l)) + (1 - lam_l) * V_l(b_{l-1})`, `lam_l = sigmoid` of a learned scalar
    (Res-Tuning, arXiv 2310.19859). Training it keeps no activation of the backbone for backward.
    """

    part: Literal["bypass"] = "bypass"
    ratio: float = Field(default=0.125, gt=0, le=8)
    """Width of the bypass state over the width of the tapped feature."""
    expansion: float = Field(default=2.0, gt=0, le=8)
    """Width inside a vertical tuner over the width of the bypass state."""
    taps: tuple[str, ...] = ("skip.*", "mid", "up.*")
    """Patterns of the sites that the bypass reads."""


PartConfig: TypeAlias = Annotated[SkipConfig | BypassConfig, Field(discriminator="part")]
_PARTS: TypeAdapter[tuple[PartConfig, ...]] = TypeAdapter(tuple[PartConfig, ...])


def parts_to_json(parts: Iterable[PartConfig]) -> str:
    """Write part configs as a JSON list."""
    return _PARTS.dump_json(tuple(parts)).decode()


def parts_from_json(text: str) -> tuple[PartConfig, ...]:
    """Read part configs back from JSON.

    Raises:
        RestuneError: if the text is not a valid list of part configs; names the first fault.
    """
    try:
        return _PARTS.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"]) or "the list"
        raise RestuneError(f"The tuner config is not valid at {place}: {first['msg']}.") from error


def match_sites(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """Select the names that match any of the patterns, in the order of `names`.

    Raises:
        RestuneError: if a pattern matches nothing; names the valid sites.
    """
    names = list(names)
    chosen: set[str] = set()
    # A list from a file may be long, so each pattern is compiled once.
    for pattern in dict.fromkeys(patterns):
        matches = re.compile(fnmatch.translate(pattern)).match
        found = [name for name in names if matches(name)]
        if not found:
            raise RestuneError(f"No site matches `{pattern}`; this base has {', '.join(names)}.")
        chosen.update(found)
    return [name for name in names if name in chosen]
