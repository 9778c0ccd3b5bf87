"""Loss by timestep: losses of noisy and nearly clean latents differ in size, which a single mean hides."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch


class BandLosses:
    """Mean loss of samples in equal bands of the base's timesteps.

    Args:
        timesteps: number of timesteps of the base.
        bands: number of bands.
    """

    def __init__(self, timesteps: int, bands: int = 5) -> None:
        self._timesteps = timesteps
        self._bands = min(bands, timesteps)
        self._sums: torch.Tensor | None = None

    @property
    def names(self) -> list[str]:
        """First and last timestep of each band, for example `0-199`."""
        edges = [-(-band * self._timesteps // self._bands) for band in range(self._bands + 1)]
        return [f"{first}-{end - 1}" for first, end in pairwise(edges)]

    def add(self, losses: torch.Tensor, timesteps: torch.Tensor) -> None:
        """Add the losses of samples.

        Args:
            losses: loss of each sample, `(samples,)`.
            timesteps: timestep of each sample, `(samples,)`, integers.
        """
        if self._sums is None:
            self._sums = torch.zeros(2, self._bands, device=losses.device)
        bands = timesteps * self._bands // self._timesteps
        self._sums[0].index_add_(0, bands, losses.detach().float())
        self._sums[1].index_add_(0, bands, torch.ones_like(losses, dtype=torch.float32))

    def take(self, device: torch.device) -> torch.Tensor:
        """Return the sums of the losses and then the numbers of samples, `(2 * bands,)` on the device, and reset."""
        sums = self._sums
        self._sums = None
        return torch.zeros(2 * self._bands, device=device) if sums is None else sums.flatten()

    def means(self, taken: Sequence[float]) -> dict[str, float]:
        """Return the mean of each band with samples, from values of `take` summed over all processes."""
        sums, counts = taken[: self._bands], taken[self._bands :]
        return {name: total / count for name, total, count in zip(self.names, sums, counts, strict=True) if count}
