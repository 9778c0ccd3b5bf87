"""A control tuner learns to use its condition: on held-out images, the right condition lowers the loss."""

import shutil

import torch

from restune_diffusion import ControlConfig, TunerManager, load_tuner
from restune_diffusion.cli.run_demo import BASE, IMAGES
from restune_diffusion.data.captions import find_examples
from restune_diffusion.data.condition_source import ConditionSource
from restune_diffusion.data.training_images import load_samples
from restune_diffusion.hooks.attachment import attach
from restune_diffusion.pipelines.load_base import load_base
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.training.latents.cache import build_cache
from restune_diffusion.training.losses.objective import Objective

HELD_OUT = 8


def cache_of(pipeline, examples, config):
    source = ConditionSource(config)
    return build_cache(pipeline, load_samples(source.paired(examples, IMAGES), 64, source))


@torch.no_grad()
def loss_on(pipeline, cache, tuner=None, roll=0):
    """Mean loss at the four noisiest of eight levels, each image with the condition of the one `roll` places away."""
    objective = Objective(pipeline.scheduler)
    latents = torch.stack([latent.mean for latent in cache.latents])
    states = torch.stack([cache.conditioning(index).states for index in range(len(cache))])
    conditions = torch.stack([each[0] for each in cache.conditions]).roll(roll, 0) / 255
    total = 0.0
    for level in range(4, 8):
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(10_000 + level))
        timesteps = torch.full((len(cache),), int((level + 0.5) * objective.timesteps / 8))
        noisy = objective.add_noise(latents, noise, timesteps)
        if tuner is None:
            prediction = pipeline.unet(noisy, timesteps, states).sample
        else:
            with attach(pipeline.unet, tuner):
                TunerManager.of(pipeline.unet).set_conditions("default", [conditions])
                prediction = pipeline.unet(noisy, timesteps, states).sample
        total += objective.loss(prediction, objective.target(latents, noise, timesteps), timesteps).item() / 4
    return total


def test_the_right_condition_helps_on_pictures_that_were_held_out(tmp_path):
    pipeline = load_base(str(BASE), torch.float32)
    examples = find_examples(IMAGES)
    folder = tmp_path / "images"
    folder.mkdir()
    for example in examples[HELD_OUT:]:
        shutil.copy(example.path, folder)
        (folder / example.path.name).with_suffix(".txt").write_text(example.caption)
    config = ControlConfig(conditions=("palette",))
    result = train(
        TrainConfig(
            base=str(BASE),
            data=folder,
            output=tmp_path / "out",
            tuner="control",
            control=config,
            steps=60,
            batch_size=8,
            learning_rate=1e-3,
            lr_scheduler="cosine",
            checkpoint_every=0,
            cpu=True,
        ),
        pipeline=pipeline,
        verbose=False,
    )
    held_out, tuner = cache_of(pipeline, examples[:HELD_OUT], config), load_tuner(result.path)
    base = loss_on(pipeline, held_out)
    right = loss_on(pipeline, held_out, tuner)
    wrong = [loss_on(pipeline, held_out, tuner, roll) for roll in (1, 2, 3)]
    print(f"base {base:.4f}, right {right:.4f}, wrong {', '.join(f'{each:.4f}' for each in wrong)}")
    assert right < 0.9 * base
    assert right < 0.93 * min(wrong)
