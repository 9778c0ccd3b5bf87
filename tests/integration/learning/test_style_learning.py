"""Training learns a style: the loss on held-out images decreases on the bundled base."""

from pathlib import Path

import pytest
import torch

from restune_diffusion import TunerManager, load_tuner
from restune_diffusion.cli.run_demo import BASE, IMAGES
from restune_diffusion.data.captions import find_examples
from restune_diffusion.data.training_images import load_samples
from restune_diffusion.hooks.attachment import attach
from restune_diffusion.pipelines.load_base import load_base
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.training.latents.cache import build_cache
from restune_diffusion.training.losses.objective import Objective


@pytest.fixture(scope="module")
def base():
    pipeline = load_base(str(BASE), torch.float32)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.requires_grad_(False)
    return pipeline


@torch.no_grad()
def loss_on(pipeline, cache):
    """Return the mean loss over all images at eight noise levels each, with noise not used in training."""
    objective = Objective(pipeline.scheduler)
    total, levels = 0.0, 8
    for level in range(levels):
        generator = torch.Generator().manual_seed(10_000 + level)
        latents = torch.stack([latent.mean for latent in cache.latents])
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.full((len(cache),), int((level + 0.5) * objective.timesteps / levels))
        states = torch.stack([cache.conditioning(index).states for index in range(len(cache))])
        noisy = objective.add_noise(latents, noise, timesteps)
        prediction = pipeline.unet(noisy, timesteps, states).sample
        total += objective.loss(prediction, objective.target(latents, noise, timesteps), timesteps).item() / levels
    return total


@pytest.mark.parametrize("kind", ["skip", "bypass"])
def test_the_style_carries_over_to_pictures_that_were_held_out(base, kind, tmp_path):
    examples = find_examples(IMAGES)
    taught, held_out = examples[6:], examples[:6]
    folder = tmp_path / "images"
    folder.mkdir()
    for example in taught:
        (folder / example.path.name).write_bytes(Path(example.path).read_bytes())
        (folder / example.path.name).with_suffix(".txt").write_text(example.caption)
    seen, unseen = (build_cache(base, load_samples(part, 64)) for part in (taught, held_out))
    before = loss_on(base, seen), loss_on(base, unseen)
    result = train(
        TrainConfig(
            base=str(BASE),
            data=folder,
            output=tmp_path / "out",
            tuner=kind,
            steps=150,
            batch_size=8,
            learning_rate=1e-3,
            lr_scheduler="cosine",
            checkpoint_every=0,
            cpu=True,
        ),
        pipeline=base,
        verbose=False,
    )
    assert TunerManager.of(base.unet) is None
    assert (loss_on(base, seen), loss_on(base, unseen)) == before
    with attach(base.unet, load_tuner(result.path)):
        after = loss_on(base, seen), loss_on(base, unseen)
    print(f"{kind}: seen {before[0]:.4f} -> {after[0]:.4f}, unseen {before[1]:.4f} -> {after[1]:.4f}")
    assert after[0] < 0.96 * before[0]
    assert after[1] < 0.985 * before[1]
