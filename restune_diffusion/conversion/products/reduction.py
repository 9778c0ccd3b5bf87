"""Rank reduction of LoRA layers by a truncated singular value decomposition."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ...utils.errors import RestuneError
from ..lora_folding import LoraLayer


@dataclass
class Reduction:
    """Limit of the rank of converted layers, and the energy kept so far.

    Energy is the squared Frobenius norm of a layer's weight change.

    Args:
        rank: largest rank of a layer; None for no limit.
        energy: fraction of each layer's energy to keep, from 0 to 1, at the smallest rank; None for all.
    """

    rank: int | None = None
    energy: float | None = None
    _kept: float = field(default=0.0, init=False)
    _total: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise RestuneError(f"The rank must be a positive number, but is {self.rank}.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise RestuneError(f"The energy to keep must be above 0 and at most 1, but is {self.energy}.")

    @property
    def active(self) -> bool:
        """Whether layers are reduced at all."""
        return self.rank is not None or self.energy is not None

    @property
    def kept(self) -> float:
        """Fraction of the energy of all layers so far that was kept."""
        return self._kept / self._total if self._total else 1.0

    def __call__(self, layer: LoraLayer) -> LoraLayer:
        """Return the best approximation of a layer within the limits, in fp32 or wider."""
        if not self.active:
            return layer
        # The product is never formed: after two QR decompositions its singular values are those of a small matrix.
        left, small_left = torch.linalg.qr(layer.factor * layer.up.double())
        right, small_right = torch.linalg.qr(layer.down.double().T)
        u, values, v = torch.linalg.svd(small_left @ small_right.T)
        rank = self.choose(values)
        root = values[:rank].sqrt()
        dtype = torch.promote_types(torch.promote_types(layer.up.dtype, layer.down.dtype), torch.float32)
        up = (left @ u[:, :rank] * root).to(dtype)
        down = (root[:, None] * v[:rank] @ right.T).to(dtype)
        return LoraLayer(down, up, float(rank))

    def choose(self, values: torch.Tensor) -> int:
        """Return the rank of a layer within the limits from its singular values, and count the energy kept.

        Args:
            values: singular values, from the largest.
        """
        rank = self._rank(values)
        self._kept += float(values[:rank].square().sum())
        self._total += float(values.square().sum())
        return rank

    def _rank(self, values: torch.Tensor) -> int:
        rank, total = values.numel(), values.square().sum()
        if not total:
            return 1
        if self.energy is not None:
            shares = values.square().cumsum(0) / total
            # The last sum may round to less than one.
            rank = min(rank, int((shares < self.energy).sum()) + 1)
        return rank if self.rank is None else min(rank, self.rank)
