"""Samples, the reward of the judges, and the gradients of the denoiser."""

import argparse

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from safetensors.torch import load_file, save_file

from research.restune_tiny.parts.examples import caption_source
from research.restune_tiny.parts.icons import load_icons
from research.restune_tiny.parts.networks import TextAndUNet, new_scheduler
from research.restune_tiny.parts.precision import TRAINING_DTYPE
from research.restune_tiny.stages.colours import train_colours
from research.restune_tiny.stages.judge import LatentJudge, label, train_judge
from research.restune_tiny.stages.refine import RefineJob, Rotation, Studio
from tests.conftest import TINY_BASE


@pytest.fixture(scope="module")
def settings(icons, tmp_path_factory):
    """Settings of the stage on synthetic icons, with synthetic latents and a judge trained on them."""
    work = tmp_path_factory.mktemp("refine")
    labels = label(load_icons(icons).records)
    generator = torch.Generator().manual_seed(0)
    styles, concepts = (torch.randn(count, 16, 8, 8, generator=generator) for count in (5, labels.count))
    clean = (styles[labels.styles] + concepts[labels.concepts]) / 2**0.5
    latents = clean[:, None] + 0.1 * torch.randn(20, 4, 16, 8, 8, generator=generator)
    colours = torch.zeros(20, 4, dtype=torch.long)
    save_file({"latents": latents.to(torch.bfloat16), "colours": colours}, work / "latents.safetensors")
    learning = argparse.Namespace(icons=icons, work=work, seed=0, lr=3e-3, steps=60, batch=32, print_every=60)
    train_judge(learning)
    return argparse.Namespace(
        icons=icons, work=work, tokenizer=TINY_BASE / "tokenizer", variants=None, seed=0, start=None, compile=False,
        batch=4, drawing_steps=6, learning_steps=5, guidance=2.0, stay=0.0, style_weight=1.0, concept_weight=1.0,
        taught=1.0, colour_weight=0.0, evenness_weight=0.0, rescale=0.0,
    )  # fmt: skip


def denoiser(settings):
    """A random text encoder and U-Net none of whose layers begins at zero."""
    torch.manual_seed(1)
    module = TextAndUNet(len(caption_source(settings).used))
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return module.to(TRAINING_DTYPE).requires_grad_(True)


def test_a_drawing_takes_the_steps_of_ddim():
    scheduler, rotation = new_scheduler(), Rotation(12)
    scheduler.set_timesteps(12)
    assert rotation.timesteps == scheduler.timesteps.tolist()
    torch.manual_seed(0)
    ours = theirs = torch.randn(2, 16, 8, 8)
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = torch.randn(2, 16, 8, 8)
        ours = rotation.step(index, ours, velocity)
        theirs = scheduler.step(velocity, timestep, theirs).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_effect_is_the_gradient_of_the_finished_drawing():
    rotation = Rotation(5)
    velocities = [torch.randn(3, requires_grad=True) for _ in range(5)]
    drawing = torch.randn(3)
    for index, velocity in enumerate(velocities):
        drawing = rotation.step(index, drawing, velocity)
    for index, found in enumerate(torch.autograd.grad(drawing.sum(), velocities)):
        torch.testing.assert_close(found, torch.full((3,), rotation.effect(index)))


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_a_drawing_is_guided_as_diffusers_guides(settings, rescale):
    settings = argparse.Namespace(**vars(settings) | {"guidance": 6.0, "rescale": rescale})
    studio = Studio(settings, denoiser(settings))
    unet, step, found, guided = studio.unet, studio.rotation.step, [], []

    def watched_unet(noisy, timesteps, states):
        found.append(unet(noisy, timesteps, states))
        return found[-1]

    def watched_step(index, noisy, velocity):
        guided.append(velocity)
        return step(index, noisy, velocity)

    studio.unet, studio.rotation.step = watched_unet, watched_step
    studio.draw(0)
    assert len(guided) == settings.drawing_steps
    for free, named, velocity in zip(found[::2], found[1::2], guided, strict=True):
        free, named = free.detach().float(), named.detach().float()
        wanted = free + 6.0 * (named - free)
        torch.testing.assert_close(velocity, rescale_noise_cfg(wanted, named, guidance_rescale=rescale))


def test_judge_tells_styles_and_concepts_of_pictures(settings):
    labels = label(load_icons(settings.icons).records)
    judge = LatentJudge(labels.count)
    judge.load_state_dict(load_file(settings.work / "judge.safetensors"))
    pictures = load_file(settings.work / "latents.safetensors")["latents"][:, 3].float()  # a variant it has not seen
    style, concept = judge.eval()(pictures)
    assert torch.equal(style.argmax(1), labels.styles)
    assert torch.equal(concept.argmax(1), labels.concepts)


def verdicts_around_a_step(settings, length):
    """Return the reward of the same samples before and after a gradient step, and the modules with a gradient."""
    module = denoiser(settings)
    studio = Studio(settings, module)

    def verdict():
        torch.manual_seed(3)
        return studio.draw(3)["verdict"]

    before = verdict()
    named = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    whole = torch.stack([gradient.float().square().sum() for gradient in named.values()]).sum().sqrt()
    with torch.no_grad():
        for name, gradient in named.items():
            module.get_parameter(name).sub_(length * gradient / whole)
    return before, verdict(), list(named)


def test_a_step_against_the_gradient_improves_the_verdict(settings):
    before, after, taught = verdicts_around_a_step(settings, 2.0)
    assert any(name.startswith("text_encoder") for name in taught)
    assert after < before - 0.05


@pytest.mark.parametrize("weight", ["colour_weight", "evenness_weight"])
def test_a_step_against_the_gradient_brings_the_colours_nearer(settings, weight):
    if not (settings.work / "colours.safetensors").exists():
        (settings.work / "vae-normalised").symlink_to(TINY_BASE / "vae")
        train_colours(settings)
    alone = {"style_weight": 0.0, "concept_weight": 0.0, weight: 1.0}
    before, after, _ = verdicts_around_a_step(argparse.Namespace(**vars(settings) | alone), 1.0)
    assert after < 0.97 * before


def test_the_last_steps_of_a_drawing_are_not_taught(settings):
    settings = argparse.Namespace(**vars(settings) | {"taught": 0.6, "learning_steps": 3})
    studio = Studio(settings, denoiser(settings))
    taught, unet = set(), studio.unet

    def watched(noisy, timesteps, states):
        if torch.is_grad_enabled():
            taught.add(int(timesteps[0]))
        return unet(noisy, timesteps, states)

    studio.unet = watched
    studio.draw(0)
    assert taught == set(studio.rotation.timesteps[1:4])  # all but the first, and three fifths of those five


def test_drawings_leave_judge_and_pictures_alone(settings):
    module = denoiser(settings)
    studio = Studio(settings, module)
    judge = {name: value.clone() for name, value in studio.judge.state_dict().items()}
    latents = studio.examples.latents.clone()
    torch.manual_seed(0)
    studio.draw(0)
    assert all(torch.equal(value, judge[name]) for name, value in studio.judge.state_dict().items())
    assert torch.equal(studio.examples.latents, latents)


def test_what_was_learned_is_held_to_what_it_was(settings):
    module = denoiser(settings)
    studio = Studio(
        argparse.Namespace(**vars(settings) | {"stay": 1.0, "style_weight": 0.0, "concept_weight": 0.0}), module
    )
    torch.manual_seed(0)
    assert studio.draw(0)["change"] == 0
    assert all(not parameter.grad.any() for parameter in module.unet.parameters() if parameter.grad is not None)

    def change():
        torch.manual_seed(0)
        return studio.draw(0)["change"]

    with torch.no_grad():
        module.unet.conv_out.bias.add_(0.5)
    moved = change()
    assert moved == pytest.approx(0.25, rel=0.02)
    # The mean of squares over 16 channels, of which each has its own bias.
    gradient = module.unet.conv_out.bias.grad.float()
    torch.testing.assert_close(gradient, torch.full((16,), 2 * 0.5 / 16), rtol=0.03, atol=0)


def test_a_micro_batch_is_repeatable(settings):
    numbers, gradients = [], []
    for _ in range(2):
        module = denoiser(settings)
        run = RefineJob(settings).prepare(module)
        numbers.append(run(5, 1))
        gradients.append([parameter.grad for parameter in module.parameters()])
    assert numbers[0] == numbers[1]
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True) if first is not None)
