"""Parts that write to each site in eager passes, resolved when the mix of tuners changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..tuners import Part
from .attached_tuner import AttachedTuner


class Writer(NamedTuple):
    """Part of a tuner that writes to a site, and the tuner's factor of the site; None in a compiled graph."""

    attached: AttachedTuner
    part: Part
    factor: float | None


class SiteWriters:
    """Active tuners, and their parts by site; a site with factor zero is left out.

    Args:
        tuners: the active tuners.
    """

    def __init__(self, tuners: Iterable[AttachedTuner]) -> None:
        self.tuners = list(tuners)
        self.taps = frozenset[str]().union(*(attached.taps for attached in self.tuners))
        self._at: dict[str, list[Writer]] = {}
        for attached in self.tuners:
            for site, parts in attached.parts_at.items():
                factor = attached.factors[site]
                if factor:
                    self._at.setdefault(site, []).extend(Writer(attached, part, factor) for part in parts)

    def at(self, site: str) -> Sequence[Writer]:
        """Return the parts that write to a site, in the order of the tuners."""
        return self._at.get(site, ())
