"""Parser for names of sites and for patterns of names; all other modules use it."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Final, Literal, TypeAlias

from ..utils.errors import RestuneError

Family: TypeAlias = Literal["skip", "down", "mid", "up", "block", "out", "stem", "head", "time", "added"]
Kind: TypeAlias = Literal["self", "cross", "ff", "block", "proj", "conv", "ends"]

OUT: Final = "out"
"""Name of the site at the input of the output head; every base has it."""
MID: Final = "mid"
"""Name of the site at the output of a U-Net's mid block."""

_NAME = re.compile(
    r"(?P<family>skip|down|mid|up|block|out)(?:\.(?P<index>0|[1-9]\d*))?"
    r"(?:\.attn\.(?P<attention>0|[1-9]\d*)\.block\.(?P<block>0|[1-9]\d*))?"
    r"(?:\.(?P<operation>self|cross|ff|block)(?:\.(?P<linear>.+))?)?",
    re.ASCII,
)
# Groups of layers of a U-Net outside its transformer blocks. Their operation is not part of the name.
_GROUPS: Final[dict[Kind, re.Pattern[str]]] = {
    "proj": re.compile(
        r"(?P<family>down|mid|up)(?:\.(?P<index>0|[1-9]\d*))?\.attn\.(?P<attention>0|[1-9]\d*)"
        r"(?:\.(?P<linear>proj_in|proj_out))?",
        re.ASCII,
    ),
    "conv": re.compile(
        r"(?P<family>down|mid|up)(?:\.(?P<index>0|[1-9]\d*))?"
        r"\.(?:resnet\.(?P<resnet>0|[1-9]\d*)|(?P<sampler>downsample|upsample))"
        r"(?:\.(?P<linear>conv|conv1|conv2|conv_shortcut|time_emb_proj))?",
        re.ASCII,
    ),
    "ends": re.compile(
        r"(?P<family>stem|head|time|added)(?:\.(?P<linear>conv_in|conv_out|linear_1|linear_2))?", re.ASCII
    ),
}
# Every component of a dotted name is a module inside the one before it.
_DOTTED = re.compile(r"\w{1,64}(\.\w{1,64}){0,11}", re.ASCII)
# Brackets come first: `[0-3]` is a character set of `fnmatch`. More than six digits are not an index.
_RANGE = re.compile(r"\[!?\]?[^\]]*\]|(?<![^\W_]|-)(?P<first>\d{1,6})-(?P<last>\d{1,6})(?![^\W_]|-)", re.ASCII)
# Placeholder of a range while `fnmatch` translates the rest.
_HOLE = "\0"


@dataclass(frozen=True)
class SiteName:
    """Parsed name of a site; `str` returns the name.

    Args:
        family: group of the site: a skip connection, a down, mid or up block of a U-Net, a block of a transformer, or
            the input of the output head.
        index: number of the skip connection or block; `mid` and `out` have none.
        attention: number of the attention module in a block of a U-Net, for a site inside it.
        block: number of the transformer block in the attention module.
        operation: operation of a site inside a transformer block, or kind of a group of layers outside them.
        linear: path of a layer in the operation or group, e.g. `to_out.0` or `proj_in`.
        resnet: number of the residual block in a block of a U-Net.
        sampler: `downsample` or `upsample`, for the sampler of a block of a U-Net.
    """

    family: Family
    index: int | None = None
    attention: int | None = None
    block: int | None = None
    operation: Kind | None = None
    linear: str | None = None
    resnet: int | None = None
    sampler: str | None = None

    @classmethod
    def find(cls, text: str) -> SiteName | None:
        """Parse a name, e.g. `skip.3` or `down.1.attn.0.block.0.self.to_q`; return None for any other text."""
        if match := _NAME.fullmatch(text):
            return cls(**_numbered(match))
        for kind, form in _GROUPS.items():
            if match := form.fullmatch(text):
                return cls(**_numbered(match), operation=kind)
        return None

    @classmethod
    def parse(cls, text: str) -> SiteName:
        """Parse a name.

        Raises:
            RestuneError: if the text is not a site name.
        """
        found = cls.find(text)
        if found is None:
            raise RestuneError(
                f"`{text}` is not a site name; expected for example `skip.3`, `up.1`, `block.0.ff` or "
                f"`down.1.attn.0.block.0.self.to_q`."
            )
        return found

    @property
    def place(self) -> str:
        """Name of the transformer block, e.g. `down.1.attn.0.block.0`, which is not a site, or of the group."""
        return str(replace(self, operation=None, linear=None))

    @property
    def operation_site(self) -> str:
        """Name of the site that describes a layer, e.g. `down.1.attn.0.block.0.self` or `down.1.attn.0`."""
        return str(replace(self, linear=None))

    def __str__(self) -> str:
        steps: list[str | int | None] = [self.family, self.index]
        for name, number in (("attn", self.attention), ("block", self.block), ("resnet", self.resnet)):
            steps += [] if number is None else [name, number]
        steps += [self.sampler, None if self.operation in _GROUPS else self.operation, self.linear]
        return ".".join(str(step) for step in steps if step is not None)


def _numbered(match: re.Match[str]) -> dict[str, Any]:
    """Return the named groups of a match, numbers as integers."""
    found: dict[str, Any] = match.groupdict()
    numbers = ("index", "attention", "block", "resnet")
    return found | {key: int(found[key]) for key in numbers if found.get(key) is not None}


def site_of(place: str, operation: Kind) -> str:
    """Return the name of an operation's site at a place: the place itself for a group of layers."""
    return place if operation in _GROUPS else f"{place}.{operation}"


def of_family(names: Iterable[str], family: Family) -> list[str]:
    """Return the names of the sites of one family, except those inside transformer blocks."""
    found = {name: SiteName.find(name) for name in names}
    return [name for name, site in found.items() if site and site.family == family and site.operation is None]


def is_dotted_name(text: str) -> bool:
    """Return whether a text can be a module path: up to 12 components of letters, digits and underscores."""
    return _DOTTED.fullmatch(text) is not None


@dataclass(frozen=True)
class SitePattern:
    """Pattern of site names.

    `*`, `?` and `[...]` have the meaning of `fnmatch`; a star may match several components of a name. A range
    `first-last` matches the numbers from `first` to `last`: `skip.0-3`, `up.1-2.*.ff`, `net.0-2`.

    Args:
        text: the pattern.
    """

    text: str

    def matches(self, name: str) -> bool:
        """Return whether a name matches."""
        return self._expression.match(name) is not None

    def select(self, names: Iterable[str]) -> list[str]:
        """Return the names that match, in their order."""
        match = self._expression.match
        return [name for name in names if match(name)]

    @cached_property
    def _expression(self) -> re.Pattern[str]:
        return _compiled(self.text)


def match_sites(patterns: Iterable[str], names: Iterable[str], what: str = "site") -> list[str]:
    """Select the names that match any of the patterns, in the order of `names`.

    Args:
        patterns: patterns in the syntax of `SitePattern`; each is compiled once.
        names: names to choose from.
        what: noun for a name in messages.

    Raises:
        RestuneError: if a pattern matches no name; the message lists the valid names.
    """
    names = list(names)
    if not names:
        raise RestuneError(f"This base has no {what} for this tuner family; choose another family.")
    chosen: set[str] = set()
    for pattern in dict.fromkeys(patterns):
        found = SitePattern(pattern).select(names)
        if not found:
            raise RestuneError(f"No {what} matches `{pattern}`; this base has {', '.join(names)}.")
        chosen.update(found)
    return [name for name in names if name in chosen]


# Weights are set repeatedly with the same few patterns.
@lru_cache(maxsize=1024)
def _compiled(text: str) -> re.Pattern[str]:
    numbers: list[str] = []

    def take_out(match: re.Match[str]) -> str:
        if match["first"] is None:
            return match[0]
        # A range whose end is before its start matches no number.
        choice = "|".join(_decimals(int(match["first"]), int(match["last"]))) or "(?!)"
        numbers.append(f"(?<![0-9])(?:{choice})(?![0-9])")
        return _HOLE

    # No name contains the placeholder character, so a pattern that contains it matches nothing in any case.
    expression = fnmatch.translate(text if _HOLE in text else _RANGE.sub(take_out, text))
    if numbers:
        left = iter(numbers)
        expression = re.sub(_HOLE, lambda _: next(left), expression)
    return re.compile(expression)


def _decimals(first: int, last: int) -> Iterator[str]:
    """Yield expressions that together match the decimal numbers from `first` to `last`, at most two per digit."""
    while first <= last:
        # Group the numbers by their leading digits: 40-79 is `[4-7][0-9]`.
        size = 1
        while first and first % (10 * size) == 0 and first + 10 * size - 1 <= last:
            size *= 10
        head, digit = divmod(first // size, 10)
        end = min(9, digit + (last + 1 - first) // size - 1)
        yield f"{head or ''}[{digit}-{end}]" + "[0-9]" * (len(str(size)) - 1)
        first += (end - digit + 1) * size
