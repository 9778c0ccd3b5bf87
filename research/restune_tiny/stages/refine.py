"""Stage that refines the denoiser with a reward on its samples."""

from __future__ import annotations

import argparse
import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from research.restune_tiny.parts.examples import Examples
from research.restune_tiny.parts.layers import SharedTextAttention, double_by_copies
from research.restune_tiny.parts.networks import new_scheduler
from research.restune_tiny.parts.precision import TRAINING_DTYPE
from research.restune_tiny.parts.trainer import micro_seed
from research.restune_tiny.stages.colours import COLOURS_FILE, Colours
from research.restune_tiny.stages.denoiser import UNetJob, denoising_loss, train_exporting
from research.restune_tiny.stages.judge import LatentJudge, disturbed, label

JUDGED_NOISE = (0.1, 0.8)
"""Range of the noise added to a sample before it is judged, in standard deviations of the latents."""


class Rotation:
    """DDIM for v-prediction: a step rotates the latents by the difference of two angles (arXiv 2202.00512, app. D)."""

    def __init__(self, steps: int) -> None:
        scheduler = new_scheduler()
        scheduler.set_timesteps(steps)
        self.timesteps: list[int] = scheduler.timesteps.tolist()
        signal = scheduler.alphas_cumprod[torch.tensor(self.timesteps)]
        angles = torch.cat([signal, scheduler.final_alpha_cumprod[None]]).sqrt().arccos()
        self.turns: list[float] = (angles[:-1] - angles[1:]).tolist()

    def step(self, index: int, noisy: Tensor, velocity: Tensor) -> Tensor:
        """Return the latents after a step."""
        turn = self.turns[index]
        return math.cos(turn) * noisy - math.sin(turn) * velocity

    def effect(self, index: int) -> float:
        """Return the derivative of the final sample by a step's velocity, with later velocities fixed."""
        later = math.prod(math.cos(turn) for turn in self.turns[index + 1 :])
        return -math.sin(self.turns[index]) * later


@dataclass
class RefineJob(UNetJob):
    """Train with the denoising loss of the U-Net stage and with a reward on samples."""

    def prepare(self, module: Any) -> Callable[[int, int], dict[str, float]]:
        """Load latents and judge; return a function that runs one micro-batch of images and one of samples."""
        studio = Studio(self.settings, module)

        def run(step: int, index: int) -> dict[str, float]:
            seed = micro_seed(self.settings.seed + 1, step, index)
            return studio.denoise(seed) | studio.draw(seed)

        return run


class Studio:
    """The trained denoiser, the judge of its samples, and a frozen copy of the initial denoiser.

    The gradient of the reward reaches the velocities of some steps of a sample, with each step's noisy latents fixed
    (deep reward tuning, arXiv 2405.00760, section 3). Nothing is saved for backward of the other steps.
    """

    def __init__(self, settings: argparse.Namespace, module: Any) -> None:
        module.unet.set_attn_processor(SharedTextAttention())
        double_by_copies(module)
        self.settings, self.examples = settings, Examples(settings)
        self.labels = label(self.examples.captions.records)
        self.judge = LatentJudge(self.labels.count)
        self.judge.load_state_dict(load_file(settings.work / "judge.safetensors"))
        self.judge.eval().requires_grad_(False)
        self.signal, self.rotation = new_scheduler().alphas_cumprod, Rotation(settings.drawing_steps)
        self.text = self.compiled(lambda ids: module.text_encoder(ids).last_hidden_state)
        self.unet = self.compiled(lambda noisy, timesteps, states: module.unet(noisy, timesteps, states).sample)
        before = copy.deepcopy(module).requires_grad_(False)
        self.before = self.compiled(before.forward)
        self.empty = self.examples.captions.ids([""])
        self.colours = Colours(settings.work) if judges_colours(settings) else None

    def compiled(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the function, compiled if `--compile` is set."""
        return torch.compile(function, dynamic=False) if self.settings.compile else function

    def denoise(self, seed: int) -> dict[str, float]:
        """Add the gradient of a micro-batch of noisy images."""
        latents, ids, _ = self.examples.batch(seed, self.settings.batch)

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return self.unet(noisy, timesteps, self.text(ids))

        loss, error = denoising_loss(predict, latents, self.signal)
        loss.backward()
        return {"loss": float(loss.detach()), "error": error}

    def draw(self, seed: int) -> dict[str, float]:
        """Generate a micro-batch of samples, and add the gradient of the reward."""
        settings, captions = self.settings, self.examples.captions
        rng, size = random.Random(seed), settings.batch
        picks = torch.multinomial(self.examples.chances, size, replacement=True)
        records = [captions.records[pick] for pick in picks.tolist()]
        ids = captions.ids([f"{captions.name(record, rng)}, {record['style']}" for record in records])
        states = self.text(ids)
        named = states.detach().requires_grad_()
        with torch.no_grad():
            unnamed = self.text(self.empty)
        # The first step starts from pure noise and decides the composition; it gets no gradient.
        taught = taught_steps(settings)
        learning = set(rng.sample(taught, settings.learning_steps))
        share = settings.guidance * len(taught) / settings.learning_steps
        noisy, moments = torch.randn(size, 16, 8, 8), []
        for index, timestep in enumerate(self.rotation.timesteps):
            given, timesteps = noisy.to(TRAINING_DTYPE), torch.full((size,), timestep)
            with torch.no_grad():
                free = self.unet(given, timesteps, unnamed).float()
            with torch.set_grad_enabled(index in learning):
                output = self.unet(given, timesteps, named)
            velocity = output.detach().float()
            guided = free + settings.guidance * (velocity - free)
            kept = kept_of_guided(velocity, guided, settings.rescale)
            if index in learning:
                with torch.no_grad():
                    change = velocity - self.before(given, timesteps, ids).float()
                moments.append((output, change, kept * share * self.rotation.effect(index)))
            noisy = self.rotation.step(index, noisy, kept * guided)
        drawn = noisy.requires_grad_()
        verdict, numbers = self.verdict(drawn, picks)
        verdict.backward()
        stay = 2 * settings.stay / (settings.learning_steps * drawn.numel())
        gradients = [(factor * drawn.grad + stay * change).to(TRAINING_DTYPE) for _, change, factor in moments]
        torch.autograd.backward([output for output, _, _ in moments], gradients)
        states.backward(named.grad)
        return numbers | {"change": sum(float(change.square().mean()) for _, change, _ in moments) / len(moments)}

    def verdict(self, drawn: Tensor, picks: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of the judges for samples of the icons at some indices, and metrics."""
        styles, concepts = self.labels.styles[picks], self.labels.concepts[picks]
        style, concept = self.judge(disturbed(drawn, *JUDGED_NOISE))
        style_loss, concept_loss = F.cross_entropy(style, styles), F.cross_entropy(concept, concepts)
        loss = self.settings.style_weight * style_loss + self.settings.concept_weight * concept_loss
        right = float((style.argmax(1) == styles).float().mean())
        found = float((concept.argmax(1) == concepts).float().mean())
        numbers = {"style": right, "concept": found}
        if self.colours:
            images = self.colours.images(drawn)
            painted, uneven = self.colours.logits(images), self.colours.excess(images, styles)
            loss = loss + self.settings.colour_weight * F.cross_entropy(painted, styles)
            loss = loss + self.settings.evenness_weight * uneven
            numbers["colours"] = float((painted.argmax(1) == styles).float().mean())
            numbers["uneven"] = float(uneven.detach())
        return loss, {"verdict": float(loss.detach())} | numbers


def kept_of_guided(named: Tensor, guided: Tensor, rescale: float) -> Tensor:
    """Return the guidance rescale factor of a guided velocity, N x C x H x W, as N x 1 x 1 x 1.

    The factor is that of diffusers' `guidance_rescale` (arXiv 2305.08891, section 3.4); it is 1 for `rescale` 0.
    """
    contrast = named.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
    return 1 + rescale * (contrast - 1)


def taught_steps(settings: argparse.Namespace) -> range:
    """Return the denoising steps of a sample that may get a gradient."""
    return range(1, 1 + round(settings.taught * (settings.drawing_steps - 1)))


def judges_colours(settings: argparse.Namespace) -> bool:
    """Return whether the reward includes colors, which requires decoding the samples."""
    return bool(settings.colour_weight or settings.evenness_weight)


def train_refine(arguments: argparse.Namespace) -> None:
    """Refine U-Net and text encoder, with regular exports of the pipeline."""
    if (taught := len(taught_steps(arguments))) < arguments.learning_steps:
        raise SystemExit(
            f"--learning-steps {arguments.learning_steps} is above the limit of {taught} set by --taught; lower it or "
            f"raise --taught."
        )
    coloured = judges_colours(arguments)
    if coloured and not (arguments.work / COLOURS_FILE).exists():
        raise SystemExit(
            f"`--colour-weight` and `--evenness-weight` need {arguments.work / COLOURS_FILE}; "
            f"run the stage `colours` first."
        )
    verdicts = ("style", "concept", "colours", "uneven") if coloured else ("style", "concept")
    train_exporting(RefineJob(arguments), ("loss", "error", "verdict", *verdicts, "change"))
