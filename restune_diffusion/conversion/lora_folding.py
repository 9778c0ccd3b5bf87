"""Bring LoRA layers of different ranks and factors under one rank and one factor, and undo it.

A `res` part has one rank and one alpha for all layers; files have one each for every layer, and not every layer. So
a smaller rank is padded with zeros to the largest, a layer that a file leaves out is zero, and a factor `alpha / rank`
that differs goes into `up`. None of this changes what the LoRA does, and the header notes it, so that writing the
file out again undoes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

LAYERS_KEY = "restune.interchange.layers"
"""Header entry: rank and alpha of each layer that had others than the whole, by site; zero where it had no layer."""
DTYPE_KEY = "restune.interchange.dtype"
"""Header entry: dtype of the file that was read, where the tuner needs a wider one."""


@dataclass(frozen=True)
class LoraLayer:
    """`(alpha / rank) * up @ down`, `down` of shape `(rank, inputs)`, `up` `(outputs, rank)`."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Rank of the product."""
        return self.down.shape[0]

    @property
    def factor(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self.rank if self.rank else 0.0

    def padded(self, rank: int) -> LoraLayer:
        """Pad to a larger rank with zeros; `alpha` stays what it is."""
        more = rank - self.rank
        return LoraLayer(F.pad(self.down, (0, 0, 0, more)), F.pad(self.up, (0, more)), self.alpha)


def scaled(up: torch.Tensor, ratio: float, dtype: torch.dtype) -> torch.Tensor:
    """Multiply `up`, rounding once."""
    return up.to(dtype) if ratio == 1 else (up.double() * ratio).to(dtype)


def folds(layer: LoraLayer, factor: float, dtype: torch.dtype) -> bool:
    """Say whether a layer's own factor can go into `up` under another one and come out of it again in this dtype."""
    ratio = layer.factor / factor
    up = layer.up.to(dtype)
    return torch.equal((scaled(up, ratio, dtype).double() / ratio).to(dtype), up)


def as_noted(layer: LoraLayer, rank: int, alpha: float, narrow: torch.dtype | None) -> LoraLayer | None:
    """Undo padding and folding.

    Args:
        layer: of the part's rank and factor.
        rank: rank in the file that was read; 0 where it had no such layer.
        alpha: alpha in that file.
        narrow: dtype in that file, where it differs.

    Returns:
        The layer as it was; None where there was none; `layer` itself where what was zero acts by now.
    """
    if rank > layer.rank or layer.down[rank:].any() or layer.up[:, rank:].any():
        return layer
    if rank == 0:
        return None
    ratio = alpha / rank / layer.factor
    down, up = layer.down[:rank].contiguous(), layer.up[:, :rank].contiguous()
    if narrow is not None:
        small = LoraLayer(down.to(narrow), scaled(up, 1 / ratio, narrow), alpha)
        if torch.equal(scaled(small.up, ratio, up.dtype), up) and torch.equal(small.down.to(down.dtype), down):
            return small
    return LoraLayer(down, up if ratio == 1 else (up.double() / ratio).to(up.dtype), alpha)


def read_notes(metadata: Mapping[str, str]) -> dict[str, tuple[int, float]]:
    """Read the notes on layers; a header that somebody garbled costs the original layout, never the content."""
    try:
        notes = json.loads(metadata.get(LAYERS_KEY, "{}"))
        read = {site: (int(rank), float(alpha)) for site, (rank, alpha) in notes.items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}
    return {site: (rank, alpha) for site, (rank, alpha) in read.items() if (rank > 0 and alpha > 0) or rank == 0}
