"""Names of sites and patterns of names: the one place that knows how a name is written."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Final, Literal, TypeAlias

from ..utils.errors import RestuneError

Family: TypeAlias = Literal["skip", "down", "mid", "up", "block", "out"]
Kind: TypeAlias = Literal["self", "cross", "ff", "block"]

OUT: Final = "out"
"""Site at the input of the output head; every base has it."""
MID: Final = "mid"
"""Site at the output of a U-Net's mid block."""

_NAME = re.compile(
    r"(?P<family>skip|down|mid|up|block|out)(?:\.(?P<index>0|[1-9]\d*))?"
    r"(?:\.attn\.(?P<attention>0|[1-9]\d*)\.block\.(?P<block>0|[1-9]\d*))?"
    r"(?:\.(?P<operation>self|cross|ff|block)(?:\.(?P<linear>.+))?)?",
    re.ASCII,
)
# Each step of a name is a module inside the last.
_DOTTED = re.compile(r"\w{1,64}(\.\w{1,64}){0,11}", re.ASCII)
# Brackets come first: `[0-3]` is a set of characters, as `fnmatch` reads it. More digits than six are no index.
_RANGE = re.compile(r"\[!?\]?[^\]]*\]|(?<![^\W_]|-)(?P<first>\d{1,6})-(?P<last>\d{1,6})(?![^\W_]|-)", re.ASCII)
# Stands for a range while `fnmatch` translates the rest.
_HOLE = "\0"


@dataclass(frozen=True)
class SiteName:
    """Name of a place on a base, taken apart; `str` puts it together again.

    Args:
        family: what the site belongs to: a skip connection, a down, mid or up block of a U-Net, a block of a
            transformer, or the input of the output head.
        index: number of the skip connection or block; `mid` and `out` have none.
        attention: number of the attention module in a block of a U-Net, for a site inside a transformer block.
        block: number of the transformer block in it.
        operation: what runs at a site inside a transformer block.
        linear: path of a linear layer in the operation, for instance `to_out.0`.
    """

    family: Family
    index: int | None = None
    attention: int | None = None
    block: int | None = None
    operation: Kind | None = None
    linear: str | None = None

    @classmethod
    def find(cls, text: str) -> SiteName | None:
        """Read a name, for instance `skip.3` or `down.1.attn.0.block.0.self.to_q`; return None for any other text."""
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        found: dict[str, Any] = match.groupdict()
        numbers = {key: int(found[key]) for key in ("index", "attention", "block") if found[key] is not None}
        return cls(**{**found, **numbers})

    @classmethod
    def parse(cls, text: str) -> SiteName:
        """Read a name.

        Raises:
            RestuneError: if the text is not the name of a site.
        """
        found = cls.find(text)
        if found is None:
            raise RestuneError(
                f"`{text}` is not the name of a site; expected for instance `skip.3`, `up.1`, `block.0.ff` or "
                f"`down.1.attn.0.block.0.self.to_q`."
            )
        return found

    @property
    def transformer_block(self) -> str:
        """Name of the transformer block that the site is in, `down.1.attn.0.block.0`; it is not a site itself."""
        return str(replace(self, operation=None, linear=None))

    @property
    def operation_site(self) -> str:
        """Name of the operation's site that a linear layer belongs to, `down.1.attn.0.block.0.self`."""
        return str(replace(self, linear=None))

    def __str__(self) -> str:
        steps: list[str | int | None] = [self.family, self.index]
        if self.attention is not None:
            steps += ["attn", self.attention, "block", self.block]
        steps += [self.operation, self.linear]
        return ".".join(str(step) for step in steps if step is not None)


def of_family(names: Iterable[str], family: Family) -> list[str]:
    """Return the names of the sites of one family, without those inside transformer blocks."""
    found = {name: SiteName.find(name) for name in names}
    return [name for name, site in found.items() if site and site.family == family and site.operation is None]


def is_dotted_name(text: str) -> bool:
    """Return whether a text can be the path of a module: up to 12 steps of letters, digits and underscores."""
    return _DOTTED.fullmatch(text) is not None


@dataclass(frozen=True)
class SitePattern:
    """Pattern of names, as a user writes it.

    `*`, `?` and `[...]` mean what they mean to `fnmatch`, and a star may stand for several steps of a name. A range
    `first-last` stands for a number from `first` to `last`: `skip.0-3`, `up.1-2.*.ff`, `net.0-2`.

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
        patterns: patterns as `SitePattern` reads them; each is compiled once.
        names: what there is to choose from.
        what: the word for one of the names in messages.

    Raises:
        RestuneError: if a pattern matches nothing; names the valid ones, calling each a `what`.
    """
    names = list(names)
    if not names:
        raise RestuneError(f"This base has no {what} for such a tuner; choose another kind of tuner.")
    chosen: set[str] = set()
    for pattern in dict.fromkeys(patterns):
        found = SitePattern(pattern).select(names)
        if not found:
            raise RestuneError(f"No {what} matches `{pattern}`; this base has {', '.join(names)}.")
        chosen.update(found)
    return [name for name in names if name in chosen]


# Weights are set again and again with the same few patterns.
@lru_cache(maxsize=1024)
def _compiled(text: str) -> re.Pattern[str]:
    numbers: list[str] = []

    def take_out(match: re.Match[str]) -> str:
        if match["first"] is None:
            return match[0]
        # A range that ends before it begins stands for no number.
        choice = "|".join(_decimals(int(match["first"]), int(match["last"]))) or "(?!)"
        numbers.append(f"(?<![0-9])(?:{choice})(?![0-9])")
        return _HOLE

    # No name holds the character that stands for a range, so a pattern with it needs no range either.
    expression = fnmatch.translate(text if _HOLE in text else _RANGE.sub(take_out, text))
    if numbers:
        left = iter(numbers)
        expression = re.sub(_HOLE, lambda _: next(left), expression)
    return re.compile(expression)


def _decimals(first: int, last: int) -> Iterator[str]:
    """Yield expressions that together match the decimal numbers from `first` to `last`, two for each digit at most."""
    while first <= last:
        # The numbers that share their leading digits, and their neighbours: 40-79 is `[4-7][0-9]`.
        size = 1
        while first and first % (10 * size) == 0 and first + 10 * size - 1 <= last:
            size *= 10
        head, digit = divmod(first // size, 10)
        end = min(9, digit + (last + 1 - first) // size - 1)
        yield f"{head or ''}[{digit}-{end}]" + "[0-9]" * (len(str(size)) - 1)
        first += (end - digit + 1) * size
