"""The subject task: train on five images of a new character, test it in new scenes.

The task follows the DreamBooth protocol (Ruiz et al. 2023, arXiv 2208.12242) of subject similarity and prompt
fidelity. Similarity uses Inception features. Fidelity is computed from pixels: the background named in the prompt.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restune_diffusion.data.captions import find_examples
from restune_diffusion.data.training_images import load_samples
from restune_diffusion.evaluation.metrics import similarity
from restune_diffusion.training.latents.batches import Batches
from restune_diffusion.training.latents.cache import build_cache
from restune_diffusion.training.losses.objective import Objective
from restune_diffusion.utils.atomic_write import atomic_write

from .character import CLASS_WORD, TOKEN, background_fidelity, held_out, render, training, write_training
from .data import to_images, to_pixels
from .methods import Method, contestants, tune
from .runner import Row, Settings, read_strip, slug
from .sampling import ImageSampler
from .scores import mean

DRIFT_PROMPTS = ("red apple", "cat face", "alien", "ghost", "automobile", "house", "tulip", "robot")
"""Prompts without the token, in which the character must not appear."""


class SubjectRun:
    """Subject run of every method, with the learning rates chosen in the style task.

    Args:
        pipeline: the base.
        inception: feature network of the similarity.
        lpips: distance of the drift.
        settings: settings of the run.
        seed: seed of tuners, batches and samples.
        rates: learning rate by method; the middle one of its sweep if not given.
        work: folder for intermediate results.
    """

    def __init__(
        self,
        pipeline: Any,
        inception: Any,
        lpips: Any,
        settings: Settings,
        seed: int,
        rates: dict[str, float],
        work: Path,
    ) -> None:
        self.pipeline, self.inception, self.lpips = pipeline, inception, lpips
        self.settings, self.seed, self.rates = settings, seed, rates
        self.folder = work / f"subject-seed{seed}"
        self.sampler = ImageSampler(pipeline, settings.inference_steps, settings.guidance)
        self.objective = Objective(pipeline.scheduler)
        self.asked = held_out()

    @cached_property
    def batches(self) -> Batches:
        """Training batches, the same for every method."""
        write_training(self.folder / "tuning")
        cache = build_cache(self.pipeline, load_samples(find_examples(self.folder / "tuning"), 64))
        return Batches(
            cache,
            seed=self.seed,
            size=self.settings.batch,
            timesteps=self.objective.timesteps,
            caption_dropout=0.0,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )

    @cached_property
    def taught_features(self) -> Tensor:
        """Features of the five training images."""
        features: Tensor = self.inception(to_pixels([render(scene.svg) for scene in training()]))
        return features

    @cached_property
    def true_features(self) -> Tensor:
        """Features of the true images of the held-out prompts."""
        features: Tensor = self.inception(to_pixels([render(scene.svg) for scene in self.asked]))
        return features

    @cached_property
    def base_drift(self) -> Tensor:
        """Samples of the base for the drift prompts."""
        return self._draw("base-leak", list(DRIFT_PROMPTS), None)

    def _draw(self, name: str, prompts: list[str], unet: Any) -> Tensor:
        path = self.folder / "drawings" / f"{name}.png"
        if not path.exists():
            images = self.sampler.generate(prompts, seed=self.seed, unet=unet)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                to_images(torch.cat(list(images), dim=1)[None])[0].save(file, format="PNG")
        return read_strip(path)

    def run(self) -> list[Row]:
        """Return the rows of the true images, the base, and every method."""
        true_images = to_pixels([render(scene.svg) for scene in self.asked])
        rows: list[Row] = [
            {"method": "true pictures"} | self.score(true_images),
            {"method": "base, not tuned"} | self.score(self._draw("base", self.prompts, None)) | {"leak": 0.0},
        ]
        return rows + [self._method_row(method) for method in contestants(self.pipeline.unet)]

    @property
    def prompts(self) -> list[str]:
        """The held-out prompts."""
        return [scene.prompt for scene in self.asked]

    def score(self, images: Tensor) -> Row:
        """Score one image per held-out prompt.

        Returns:
            `subject`: mean cosine similarity to the five training images. `true`: mean cosine similarity to the true
            image of the same prompt. `prompt`: share of images with the background of the prompt.
        """
        features = self.inception(images)
        taught = torch.nn.functional.normalize(self.taught_features, dim=1)
        near = torch.nn.functional.normalize(features, dim=1) @ taught.T
        kept = [
            background_fidelity(image, scene.background)
            for image, scene in zip(to_images(images), self.asked, strict=True)
        ]
        return {
            "subject": mean(near),
            "true": mean(similarity(features, self.true_features)),
            "prompt": sum(kept) / len(kept),
        }

    def _method_row(self, method: Method) -> Row:
        path = self.folder / "rows" / f"{slug(method.name)}.json"
        if path.exists():
            kept: Row = json.loads(path.read_text())
            return kept
        rate = self.rates.get(method.name, method.learning_rates[1])
        trainable = method.start(self.pipeline.unet, self.seed)
        course = tune(
            trainable,
            self.batches,
            self.objective,
            steps=self.settings.steps,
            learning_rate=rate,
            warmup=self.settings.warmup,
        )
        images = self._draw(slug(method.name), self.prompts, trainable.unet)
        drift = self._draw(f"{slug(method.name)}-leak", list(DRIFT_PROMPTS), trainable.unet)
        row = {"method": method.name} | self.score(images) | {"leak": mean(self.lpips(drift, self.base_drift))}
        row |= {"learning_rate": rate, "parameters": trainable.count, "seed": self.seed} | asdict(course)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps(row, indent=1).encode())
        return row


ABOUT = (
    f"`{TOKEN} {CLASS_WORD}`: five training images, then ten prompts with new backgrounds. Subject: mean Inception "
    "cosine similarity to the five images; true: to the true image of the same prompt; prompt: share of samples with "
    "the background of the prompt; drift: LPIPS between tuned model and base for "
    f"{len(DRIFT_PROMPTS)} prompts without the token."
)
