from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from restune_diffusion.data.captions import find_examples
from restune_diffusion.data.training_images import load_samples
from restune_diffusion.training.latents.batches import Batches
from restune_diffusion.training.latents.cache import Cache, Latent, build_cache

from ....tiny_training import sd_pipeline


@pytest.fixture(scope="module")
def cache(images: Path) -> Cache:
    return build_cache(sd_pipeline(), load_samples(find_examples(images), 16))


def batches(cache: Cache, size: int = 3, dropout: float = 0.0) -> Batches:
    cpu = torch.device("cpu")
    return Batches(cache, seed=0, size=size, timesteps=1000, caption_dropout=dropout, device=cpu, dtype=torch.float32)


def test_a_batch_holds_each_image_with_its_own_caption(cache: Cache) -> None:
    certain = replace(cache, latents=[Latent(image.mean, torch.zeros_like(image.std)) for image in cache.latents])
    batch = batches(certain, size=6)[0]
    found = []
    for latent, states in zip(batch.latents, batch.inputs["encoder_hidden_states"], strict=True):
        (index,) = [number for number, image in enumerate(cache.latents) if torch.equal(latent, image.mean)]
        assert torch.equal(states, cache.conditioning(index).states)
        found.append(index)
    assert sorted(found) == list(range(6))


def test_batches_continue_the_sampler(cache: Cache) -> None:
    small, large = batches(cache, size=1), batches(cache, size=4)[1]
    for place in range(4):
        one = small[4 + place]
        assert torch.equal(one.latents[0], large.latents[place])
        assert torch.equal(one.noise[0], large.noise[place])
        assert one.timesteps[0] == large.timesteps[place]


def test_noise_and_timesteps_have_the_right_distribution(cache: Cache) -> None:
    batch = batches(cache, size=600)[0]
    assert abs(batch.noise.mean()) < 0.01
    assert abs(batch.noise.std() - 1) < 0.01
    assert batch.timesteps.min() < 20
    assert batch.timesteps.max() > 980
    assert abs(batch.timesteps.float().mean() - 500) < 40


@pytest.mark.parametrize("dropout", [0.0, 0.3, 1.0])
def test_captions_are_dropped_as_often_as_asked(cache: Cache, dropout: float) -> None:
    states = batches(cache, size=400, dropout=dropout)[0].inputs["encoder_hidden_states"]
    share = torch.stack([(state == cache.unconditional.states).all() for state in states]).float().mean()
    assert share == pytest.approx(dropout, abs=0.07 if dropout == 0.3 else 0)
