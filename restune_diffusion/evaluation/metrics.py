"""Numbers from features: tensors in, tensors or floats out. Features are N x D, one row an image."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.nn.functional import normalize

from ..utils.errors import RestuneError
from .packaged import require_package


def kernel_distance(
    found: torch.Tensor,
    wanted: torch.Tensor,
    *,
    subset_size: int | None = None,
    subsets: int = 100,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the kernel distance of two sets of features, KID (Binkowski et al. 2018, arXiv 1801.01401).

    It is the unbiased estimate of the squared maximum mean discrepancy under the kernel (x.y / D + 1)^3, computed in
    float64. Being unbiased, it is a little below zero as often as above where both sets have one distribution.

    Args:
        found, wanted: features, N x D and M x D; at least 2 rows each.
        subset_size: rows that are drawn from each set, without repetition; those of the smaller set at most, and by
            default.
        subsets: how often they are drawn. Where every draw would be the whole of both sets, one is made.
        seed: seed of the draws; the global random state stays as it is.

    Returns:
        Mean and standard deviation over the subsets.

    Raises:
        RestuneError: if a set has fewer than two rows, or torchmetrics is not installed.
    """
    size = min(len(found), len(wanted), *([] if subset_size is None else [subset_size]))
    if size < 2:
        raise RestuneError("A kernel distance needs at least two images on either side.")
    require_package("torchmetrics")
    from torchmetrics.image.kid import KernelInceptionDistance

    if size == len(found) == len(wanted):
        subsets = 1
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # It warns that it keeps all features in memory; they are there already.
        warnings.simplefilter("ignore", UserWarning)
        metric = KernelInceptionDistance(nn.Identity(), subsets=subsets, subset_size=size)
        metric.update(wanted.cpu().double(), real=True)
        metric.update(found.cpu().double(), real=False)
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def similarity(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the cosine similarity of each row of `found` to the same row of `wanted`: N numbers in [-1, 1]."""
    return (_unit(found) * _unit(wanted)).sum(dim=1)


def nearest_distance(found: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return 1 - the largest cosine similarity of each row of `found` to any row of `others`; 0 is a copy."""
    return 1 - _similarities(found, others).amax(dim=1)


def retrieval_accuracy(found: torch.Tensor, wanted: torch.Tensor, k: int) -> float:
    """Return the share of rows of `found` whose own row of `wanted` is among the k most similar ones.

    By chance it is k / N.
    """
    similarities = _similarities(found, wanted)
    better = (similarities > similarities.diagonal()[:, None]).sum(dim=1)
    return _share(better < k)


def style_share(found: torch.Tensor, wanted: torch.Tensor, base: torch.Tensor) -> float:
    """Return the share of rows of `found` whose nearest neighbour is in `wanted` rather than in `base`.

    A two-sample vote in the manner of the 1-NN test (Lopez-Paz and Oquab 2017, arXiv 1610.06545). Row i of all three
    belongs to prompt i; a row's own prompt has no vote, because there the subject would decide, not the style.

    Args:
        found, wanted, base: features of the same N >= 2 prompts, N x D each.
    """
    own = torch.eye(len(found), dtype=torch.bool, device=found.device)
    nearest_wanted = _similarities(found, wanted).masked_fill(own, -torch.inf).amax(dim=1)
    nearest_base = _similarities(found, base).masked_fill(own, -torch.inf).amax(dim=1)
    return _share(nearest_wanted > nearest_base)


def _similarities(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return _unit(rows) @ _unit(columns).T


def _unit(features: torch.Tensor) -> torch.Tensor:
    # In float64, the similarity of a row to itself is 1 to fifteen digits.
    return normalize(features.double(), dim=1)


def _share(hits: torch.Tensor) -> float:
    return hits.double().mean().item()
