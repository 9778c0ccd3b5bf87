"""Parts that write to each site in eager passes, resolved when the mix of tuners changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from ..tuners import Part
from ..tuners.base import Bottleneck
from .attached_tuner import AttachedTuner
from .stacked import StackedBottlenecks


class Writer(NamedTuple):
    """Part of a tuner that writes to a site, and the tuner's factor of the site; None in a compiled graph."""

    attached: AttachedTuner
    part: Part
    factor: float | None


class StackedWriters(NamedTuple):
    """Parts at a site that are computed as one."""

    writers: Sequence[Writer]
    layers: StackedBottlenecks


class SiteWriters:
    """Active tuners, and their parts by site; a site with factor zero is left out.

    Args:
        tuners: the active tuners.
    """

    def __init__(self, tuners: Iterable[AttachedTuner]) -> None:
        self.tuners = list(tuners)
        self.taps = frozenset[str]().union(*(attached.taps for attached in self.tuners))
        self._at: dict[str, list[Writer]] = {}
        self._groups: dict[str, tuple[list[StackedWriters], list[Writer]]] = {}
        self._hooked: dict[Part, bool] = {}
        for attached in self.tuners:
            for site, parts in attached.parts_at.items():
                factor = attached.factors[site]
                if factor:
                    self._at.setdefault(site, []).extend(Writer(attached, part, factor) for part in parts)

    def at(self, site: str) -> Sequence[Writer]:
        """Return the parts that write to a site, in the order of the tuners."""
        return self._at.get(site, ())

    def add_stacked(self, site: str, x: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, Sequence[Writer]]:
        """Add the residuals of parts that can be computed as one to `total`, and return the parts that remain."""
        found = self._groups.get(site)
        if found is None:
            found = self._groups[site] = self._grouped(site)
        groups, rest = found
        left = list(rest)
        for writers, layers in groups:
            if any(writer.attached.tuner.autocast is not None for writer in writers):
                left += writers
                continue
            for writer in writers:
                writer.attached.follow(x.device)
            residual = layers.residual(x, tuple(writer.attached.factors_at(writer.factor) for writer in writers))
            if residual is None:
                left += writers
            else:
                total = total + residual.to(total.dtype)
        return total, left

    def _grouped(self, site: str) -> tuple[list[StackedWriters], list[Writer]]:
        writers = self.at(site)
        alike: dict[tuple[bool, bool], list[tuple[Writer, Bottleneck]]] = {}
        for writer in writers:
            layer = writer.part.bottleneck(site) if self._can_be_stacked(writer) else None
            if layer is not None:
                alike.setdefault((layer.gelu, layer.channels_first), []).append((writer, layer))
        several = [pairs for pairs in alike.values() if len(pairs) > 1]
        stacked = {id(writer) for pairs in several for writer, _ in pairs}
        groups = [
            StackedWriters([writer for writer, _ in pairs], StackedBottlenecks([layer for _, layer in pairs]))
            for pairs in several
        ]
        return groups, [writer for writer in writers if id(writer) not in stacked]

    def _can_be_stacked(self, writer: Writer) -> bool:
        """Return whether a part may be computed without calling it: its mask and its hooks would have no effect."""
        if writer.attached.weight.mask is not None:
            return False
        part = writer.part
        if part not in self._hooked:
            self._hooked[part] = any(each._forward_pre_hooks or each._forward_hooks for each in part.modules())
        return not self._hooked[part]
