"""Noise and timesteps of samples, against the papers' formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

import pytest
import torch

from restune_diffusion.data.captions import find_examples
from restune_diffusion.data.training_images import load_samples
from restune_diffusion.training.latents.batches import Batch, Batches
from restune_diffusion.training.latents.cache import Cache, build_cache
from restune_diffusion.training.latents.noising import Noising
from restune_diffusion.utils.errors import TrainingError

from ....tiny_training import sd_pipeline

MakeBatches = Callable[..., Batches]


@pytest.fixture(scope="module")
def cache(images: Path) -> Cache:
    return build_cache(sd_pipeline(), load_samples(find_examples(images), 16))


@pytest.fixture
def batches(cache: Cache) -> MakeBatches:
    def make(size: int = 4, seed: int = 0, **noising: float | str | None) -> Batches:
        return Batches(
            cache,
            seed=seed,
            size=size,
            timesteps=1000,
            caption_dropout=0.3,
            device=torch.device("cpu"),
            dtype=torch.float32,
            noising=Noising(**noising),  # type: ignore[arg-type]
        )

    return make


def draws(noising: Noising, count: int = 20_000, timesteps: int = 1000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([noising.timestep(timesteps, generator) for _ in range(count)])


def test_logit_normal_timesteps_have_the_distribution_of_the_formula() -> None:
    """P(t < k) is the normal CDF at the logit of the position of k in the range."""
    mean, std, low, high = 0.5, 1.5, 100, 900
    found = draws(Noising(sampling="logit_normal", logit_mean=mean, logit_std=std, low=low, high=high))
    assert found.dtype == torch.int64
    for k in range(low + 20, high, 20):
        place = (k - low) / (high - low)
        expected = NormalDist(mean, std).cdf(math.log(place / (1 - place)))
        # five standard deviations of a share of 20,000
        assert abs((found < k).double().mean().item() - expected) < 5 * math.sqrt(0.25 / 20_000), k
    assert found.min() >= low
    assert found.max() < high


def test_a_logit_that_rounds_to_the_end_stays_in_the_range() -> None:
    assert draws(Noising(sampling="logit_normal", logit_mean=100.0), count=5).tolist() == [999] * 5
    assert draws(Noising(sampling="logit_normal", logit_mean=-800.0, low=7), count=5).tolist() == [7] * 5


def test_uniform_timesteps_fill_their_range_and_no_more() -> None:
    found = draws(Noising(low=3, high=8), count=5000)
    counts = torch.bincount(found, minlength=10)
    assert counts[:3].sum() == counts[8:].sum() == 0
    assert (counts[3:8] - 1000).abs().max() < 5 * math.sqrt(5000 * 0.2 * 0.8)


@pytest.mark.parametrize(("low", "high"), [(0, 1001), (500, 500), (1000, None)])
def test_a_range_outside_the_base_is_refused(batches: MakeBatches, low: int, high: int | None) -> None:
    message = f"Invalid range of timesteps {low} to {high or 1000}; it must be within 0 to 1000"
    with pytest.raises(TrainingError, match=message):
        batches(low=low, high=high)


def same_but(first: Batch, second: Batch, *names: str) -> bool:
    kept = {"latents", "noise", "timesteps"} - set(names)
    texts = [batch.inputs["encoder_hidden_states"] for batch in (first, second)]
    return torch.equal(*texts) and all(torch.equal(getattr(first, name), getattr(second, name)) for name in kept)


def test_noise_offset_moves_each_channel_by_a_normal_constant(batches: MakeBatches) -> None:
    plain, moved = batches(size=1500)[0], batches(size=1500, offset=0.3)[0]
    assert same_but(plain, moved, "noise")
    offset = (moved.noise - plain.noise).double()
    torch.testing.assert_close(offset, offset.mean((2, 3), keepdim=True).expand_as(offset), atol=1e-6, rtol=0)
    constants = offset.mean((2, 3)).flatten()
    # 6,000 draws of N(0, 0.3)
    assert abs(constants.mean().item()) < 5 * 0.3 / math.sqrt(len(constants))
    assert constants.std().item() == pytest.approx(0.3, rel=0.05)
    # one for each channel: those of a sample are not alike
    assert abs(torch.corrcoef(offset.mean((2, 3)).T)[0, 1].item()) < 0.1


def test_input_perturbation_is_in_the_input_alone(batches: MakeBatches) -> None:
    plain, perturbed = batches(size=300)[0], batches(size=300, perturbation=0.2)[0]
    assert same_but(plain, perturbed), "the noise that is the target stays as it was"
    assert torch.equal(plain.input_noise, plain.noise)
    extra = (perturbed.input_noise - perturbed.noise).double()
    assert extra.std().item() == pytest.approx(0.2, rel=0.03)
    assert abs(torch.corrcoef(torch.stack([extra.flatten(), plain.noise.double().flatten()]))[0, 1].item()) < 0.03


def test_all_draws_depend_on_seed_and_position_alone(batches: MakeBatches) -> None:
    chosen = {"offset": 0.1, "perturbation": 0.1, "sampling": "logit_normal", "low": 10}
    ahead, other = batches(size=2, **chosen), batches(size=2, seed=1, **chosen)
    for number in (0, 1, 2):
        ahead[number]
    late, again = ahead[3], batches(size=2, **chosen)[3]
    assert same_but(late, again)
    assert torch.equal(late.input_noise, again.input_noise)
    assert not torch.equal(late.input_noise, other[3].input_noise)
    assert torch.equal(batches(size=8, **chosen)[0].input_noise[6:], late.input_noise)
