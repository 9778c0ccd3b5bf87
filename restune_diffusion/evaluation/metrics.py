"""Metrics on feature tensors. Features are N x D, one row per image."""

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
    """Return the kernel inception distance (KID) of two sets of features (Binkowski et al. 2018, arXiv 1801.01401).

    KID is the unbiased estimate of the squared maximum mean discrepancy under the kernel (x.y / D + 1)^3, computed in
    float64. For two sets from one distribution the estimate is slightly below zero as often as above.

    Args:
        found, wanted: features, N x D and M x D; at least 2 rows each.
        subset_size: rows drawn from each set, without replacement. The size of the smaller set is the maximum and the
            default.
        subsets: number of random subsets; 1 is used if every subset would be both whole sets.
        seed: seed of the subsets; the global random state is restored.

    Returns:
        Mean and standard deviation over the subsets.

    Raises:
        RestuneError: if a set has fewer than two rows, or torchmetrics is not installed.
    """
    size = min(len(found), len(wanted), *([] if subset_size is None else [subset_size]))
    if size < 2:
        raise RestuneError(f"A kernel distance needs at least two images in each set, but the size is {size}.")
    require_package("torchmetrics")
    from torchmetrics.image.kid import KernelInceptionDistance

    if size == len(found) == len(wanted):
        subsets = 1
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # torchmetrics warns that it keeps all features in memory; they are in memory already.
        warnings.simplefilter("ignore", UserWarning)
        metric = KernelInceptionDistance(nn.Identity(), subsets=subsets, subset_size=size)
        metric.update(wanted.cpu().double(), real=True)
        metric.update(found.cpu().double(), real=False)
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def similarity(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the cosine similarity of each row of `found` and the same row of `wanted`: N values in [-1, 1]."""
    return (_unit(found) * _unit(wanted)).sum(dim=1)


def nearest_distance(found: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return 1 minus the largest cosine similarity of each row of `found` to any row of `others`; 0 is a copy."""
    return 1 - _similarities(found, others).amax(dim=1)


def retrieval_accuracy(found: torch.Tensor, wanted: torch.Tensor, k: int) -> float:
    """Return the share of rows of `found` for which the same row of `wanted` is among the k most similar rows.

    The chance level is k / N.
    """
    similarities = _similarities(found, wanted)
    better = (similarities > similarities.diagonal()[:, None]).sum(dim=1)
    return _share(better < k)


def style_share(found: torch.Tensor, wanted: torch.Tensor, base: torch.Tensor) -> float:
    """Return the share of rows of `found` whose nearest neighbor is in `wanted` rather than in `base`.

    The metric follows the 1-NN two-sample test (Lopez-Paz and Oquab 2017, arXiv 1610.06545). Row i of all three sets
    belongs to prompt i. Rows of the same prompt are excluded: there the subject would decide instead of the style.

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
    # float64 gives the similarity of a row to itself as 1 to fifteen digits.
    return normalize(features.double(), dim=1)


def _share(hits: torch.Tensor) -> float:
    return hits.double().mean().item()
