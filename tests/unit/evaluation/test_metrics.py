from __future__ import annotations

import numpy as np
import pytest
import torch

from restune_diffusion.evaluation.metrics import (
    kernel_distance,
    nearest_distance,
    retrieval_accuracy,
    similarity,
    style_share,
)
from restune_diffusion.utils.errors import RestuneError


def draw(count: int, width: int = 16, *, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


def polynomial_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Return the unbiased estimate, computed term by term."""

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    between = sum(kernel(a, b) for a in x for b in y) / (n * m)
    return within_x + within_y - 2 * between


def test_kernel_distance_is_the_unbiased_polynomial_mmd() -> None:
    found, wanted = draw(9), draw(9, seed=1, shift=0.3)
    mean, deviation = kernel_distance(found, wanted)
    assert mean == pytest.approx(polynomial_mmd(found.double().numpy(), wanted.double().numpy()), rel=1e-9)
    assert deviation == 0


def test_kernel_distance_separates_a_shifted_set_from_two_halves_of_one() -> None:
    pool = draw(400)
    same, _ = kernel_distance(pool[::2], pool[1::2])
    shifted, _ = kernel_distance(pool[::2], pool[1::2] + 0.5)
    assert abs(same) < 0.05
    assert shifted > 0.5


def test_kernel_distance_draws_seeded_subsets_and_leaves_the_global_state_alone() -> None:
    found, wanted = draw(12), draw(20, seed=1)
    before = torch.get_rng_state()
    first = kernel_distance(found, wanted, subset_size=5, subsets=7, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == kernel_distance(found, wanted, subset_size=5, subsets=7, seed=3)
    assert first != kernel_distance(found, wanted, subset_size=5, subsets=7, seed=4)
    assert first[1] > 0
    # a set of another size leaves a choice even at the largest subset, which is never exceeded
    assert kernel_distance(found, wanted)[1] > 0
    assert kernel_distance(found, wanted, subset_size=1000) == kernel_distance(found, wanted)
    with pytest.raises(RestuneError, match="at least two images"):
        kernel_distance(found[:1], wanted)


def test_similarity_is_the_cosine_of_each_pair() -> None:
    found = torch.tensor([[1.0, 0.0], [2.0, 2.0], [0.0, 3.0]])
    wanted = torch.tensor([[5.0, 0.0], [1.0, 0.0], [0.0, -1.0]])
    torch.testing.assert_close(similarity(found, wanted), torch.tensor([1.0, 0.5**0.5, -1.0]).double())


def test_nearest_distance_is_zero_for_a_copy_alone() -> None:
    others = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = torch.tensor([[0.0, 4.0], [3.0, 4.0]])
    torch.testing.assert_close(nearest_distance(found, others), torch.tensor([0.0, 0.2]).double())


def test_retrieval_loses_on_shuffled_rows() -> None:
    wanted = draw(30)
    found = wanted + 0.3 * draw(30, seed=1)
    assert retrieval_accuracy(found, wanted, 1) == 1
    assert retrieval_accuracy(found.roll(1, dims=0), wanted, 1) == 0
    random = retrieval_accuracy(draw(30, seed=2), wanted, 10)
    assert 0.1 < random < 0.6
    assert retrieval_accuracy(draw(30, seed=2), wanted, 30) == 1


def test_style_share_follows_the_cluster_and_not_the_subject() -> None:
    style, plain = torch.eye(16)[0] * 6, torch.eye(16)[1] * 6
    subjects = draw(20)
    wanted, base = subjects + style, subjects + plain
    assert style_share(subjects + style + 0.1 * draw(20, seed=1), wanted, base) == 1
    assert style_share(subjects + plain + 0.1 * draw(20, seed=1), wanted, base) == 0
    # half a style: the first rows have it, the others do not
    mixed = torch.cat([wanted[:5], base[5:]])
    assert style_share(mixed, wanted, base) == 0.25


def test_style_share_gives_a_rows_own_prompt_no_vote() -> None:
    # every row's twin is in `wanted`, yet all that other prompts have is the base's style
    found = torch.eye(8)[:4]
    base = torch.ones(4, 8)
    assert style_share(found, found, base) == 0
