"""Fold LoRA layers of different ranks and factors into one common rank and factor, and undo it.

A `res` part has one rank and one alpha for all layers; LoRA files have a rank and an alpha per layer, and may omit
layers. So smaller ranks are padded with zeros to the largest, omitted layers are zero, and a different factor
`alpha / rank` is folded into `up`. The LoRA's output does not change, and the header records the original values, so
that exporting the tuner restores them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

LAYERS_KEY = "restune.interchange.layers"
"""Header entry: original rank and alpha, by site, of each layer that was changed; zero for an omitted layer."""
DTYPE_KEY = "restune.interchange.dtype"
"""Header entry: dtype of the original file, if the tuner needs a wider one."""


@dataclass(frozen=True)
class LoraLayer:
    """LoRA layer `(alpha / rank) * up @ down` with `down` of shape `(rank, inputs)` and `up` of `(outputs, rank)`.

    Of a convolution, `inputs` counts the input channels at every position of the kernel.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Rank of the product."""
        return self.down.shape[0]

    @property
    def factor(self) -> float:
        """Factor `alpha / rank` of the product."""
        return self.alpha / self.rank if self.rank else 0.0

    def halves(self, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `down` and `up` in the shapes that they have beside a weight of the given shape."""
        outputs, *inside = shape
        return self.down.reshape(-1, *inside), self.up.reshape(outputs, -1, *[1] * len(inside[1:]))

    def padded(self, rank: int) -> LoraLayer:
        """Pad to a larger rank with zeros, keeping `alpha`."""
        more = rank - self.rank
        return LoraLayer(F.pad(self.down, (0, 0, 0, more)), F.pad(self.up, (0, more)), self.alpha)


def scaled(up: torch.Tensor, ratio: float, dtype: torch.dtype) -> torch.Tensor:
    """Multiply `up` by a ratio, rounding once."""
    return up.to(dtype) if ratio == 1 else (up.double() * ratio).to(dtype)


def folds(layer: LoraLayer, factor: float, dtype: torch.dtype) -> bool:
    """Return whether folding a layer's factor into `up`, relative to a common factor, is reversible in a dtype."""
    ratio = layer.factor / factor
    up = layer.up.to(dtype)
    return torch.equal((scaled(up, ratio, dtype).double() / ratio).to(dtype), up)


def as_noted(layer: LoraLayer, rank: int, alpha: float, narrow: torch.dtype | None) -> LoraLayer | None:
    """Undo padding and folding.

    Args:
        layer: layer with the part's rank and factor.
        rank: rank in the original file; 0 if the file omitted the layer.
        alpha: alpha in the original file.
        narrow: dtype in the original file, if it differs.

    Returns:
        The original layer; None if the file omitted it; `layer` itself if the padding is no longer zero.
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
    """Read the original ranks and alphas by site; an invalid entry is ignored, so that only the layout is lost."""
    try:
        notes = json.loads(metadata.get(LAYERS_KEY, "{}"))
        read = {site: (int(rank), float(alpha)) for site, (rank, alpha) in notes.items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}
    return {site: (rank, alpha) for site, (rank, alpha) in read.items() if (rank > 0 and alpha > 0) or rank == 0}
