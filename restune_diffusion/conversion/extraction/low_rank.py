"""Singular value decomposition of a weight change, cut to a rank."""

from __future__ import annotations

import math

import torch

from ..lora_folding import LoraLayer
from ..products.reduction import Reduction

_EPSILON = torch.finfo(torch.float32).eps


def low_rank(change: torch.Tensor, reduction: Reduction, size: float = 0.0) -> tuple[LoraLayer, float]:
    """Return the best approximation of a weight change within the limits, and the share of its energy that is kept.

    The singular vectors of the shorter side are the eigenvectors of the Gram matrix in float64, in which its squared
    singular values are as exact as those of a decomposition in fp32. The other half is a product with the change
    itself, so that a layer of full rank reproduces it.

    Args:
        change: change of a weight, not zero; a convolution counts as outputs by inputs and kernel positions.
        reduction: limits of the rank.
        size: root mean square of the weight. Singular values that rounding of such weights in fp32 can cause are
            dropped, so that the change of a merged LoRA has its rank.
    """
    matrix = change.flatten(1).double()
    wide = matrix.shape[0] <= matrix.shape[1]
    short = matrix if wide else matrix.T
    squares, vectors = torch.linalg.eigh(short @ short.T)
    values = squares.clamp(min=0).flip(0).sqrt()
    # Largest singular value of a random matrix whose entries have the standard deviation 1.
    spread = math.sqrt(matrix.shape[0]) + math.sqrt(matrix.shape[1])
    values = values[values > max(_EPSILON * size * spread, _EPSILON * float(values[0]))]
    rank = reduction.choose(values)
    root = values[:rank].sqrt()
    chosen = vectors.flip(1)[:, :rank]
    own, other = chosen * root, (chosen.T @ short) / root[:, None]
    up, down = (own, other) if wide else (other.T, own.T)
    kept = float(values[:rank].square().sum() / matrix.square().sum())
    return LoraLayer(down.float().contiguous(), up.float().contiguous(), float(rank)), min(kept, 1.0)
