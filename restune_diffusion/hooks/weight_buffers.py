"""Tensors from which a compiled graph reads the weight of a tuner."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..utils.devices import overwrite, sent
from .mixing import ForwardContext
from .weights import Schedule, TunerWeight, Value, piece_factor, piece_holds, row_factor

# Capacity of the tensors; exceeding it recompiles once.
_IMAGES = 64
_PIECES = 16
_ALWAYS = Schedule(((0.0, 1.0, 1.0, 1.0),))
# Larger than any progress, so that the segment never applies.
_UNUSED = 2.0


class WeightBuffers:
    """Tensors from which a compiled graph reads a tuner's weight; they are updated in place.

    Args:
        sites: the sites that the tuner writes to.
        device: device of the tuner.
    """

    def __init__(self, sites: Sequence[str], device: torch.device) -> None:
        self.place = {site: index for index, site in enumerate(sites)}
        self.values = torch.zeros(_IMAGES, device=device)
        self.count = torch.ones((), dtype=torch.long, device=device)
        self.sites = torch.ones(len(sites), device=device)
        self.curve = torch.full((_PIECES, 6), _UNUSED, device=device)
        self.mask: torch.Tensor | None = None
        """Mask in fp32, in its own resolution; eager passes read it too."""

    def set(self, weight: TunerWeight, factors: dict[str, float]) -> None:
        """Write a weight and its factors by site to the tensors."""
        device = self.values.device
        if weight.count > len(self.values):
            self.values = torch.zeros(weight.count, device=device)
        overwrite(self.values[: weight.count], torch.tensor(weight.values))
        self.count.fill_(weight.count)
        overwrite(self.sites, torch.tensor([factors[site] for site in self.place]))
        # Without a schedule the factor is one throughout, so that setting a schedule later reuses the same graph.
        pieces = (weight.steps or _ALWAYS).disjoint()
        if len(pieces) > len(self.curve):
            self.curve = torch.full((len(pieces), 6), _UNUSED, device=device)
        self.curve.fill_(_UNUSED)
        if pieces:
            overwrite(self.curve[: len(pieces)], torch.tensor(pieces))
        if weight.mask is None:
            self.mask = None
        elif self.mask is not None and self.mask.shape == weight.mask.shape:
            overwrite(self.mask, weight.mask.detach())
        else:
            self.mask = sent(weight.mask.detach(), device).to(torch.float32, copy=True)

    def to(self, device: torch.device) -> None:
        """Move the tensors to a device."""
        self.values, self.count = self.values.to(device), self.count.to(device)
        self.sites, self.curve = self.sites.to(device), self.curve.to(device)
        self.mask = None if self.mask is None else self.mask.to(device)

    def factors(self, site: str, weight: TunerWeight, this: ForwardContext) -> torch.Tensor:
        """Return the factor of every row at a site, `(rows * frames,)`, without reading a tensor's value.

        It does not check that the batch size is a multiple of the number of values, which the graph cannot read.
        """
        rows = torch.arange(this.rows, device=self.values.device)
        value, step = self.values[rows % self.count], self._step(this.progress.to(rows.device))
        half: Value = 1.0
        if weight.on != "both":
            images = this.images(weight)
            if this.guided(images):
                # Computed on the device: a constant of the graph would be on the host and copied in each pass.
                half = rows < images if weight.on == "uncond" else rows >= images
            elif weight.on == "uncond":
                half = 0.0
        factors: torch.Tensor = row_factor(value, half, step) * self.sites[self.place[site]]
        return factors if this.frames == 1 else factors.repeat_interleave(this.frames)

    def _step(self, progress: torch.Tensor) -> torch.Tensor:
        """Evaluate `Schedule.at` for a tensor of progresses."""
        begin, end, start, length, first, last = self.curve.unbind(1)
        progress = progress[..., None]
        factors = piece_factor(progress, start, length, first, last)
        return torch.where(piece_holds(progress, begin, end), factors, 0).sum(-1)
