"""The subject task: five pictures of one new character, then the character in new places.

After the DreamBooth protocol (Ruiz et al. 2023, arXiv 2208.12242): subject similarity against prompt fidelity, here
with Inception features and a fidelity that the pixels themselves decide, the background that the prompt asks for.
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
from .draw import Artist
from .methods import Method, contestants, tune
from .runner import Row, Settings, read_strip, slug
from .scores import mean

LEAK_PROMPTS = ("red apple", "cat face", "alien", "ghost", "automobile", "house", "tulip", "robot")
"""Prompts without the token, where the character must not show."""


class SubjectRun:
    """Every method on the subject, with the learning rate that the style task chose for it.

    Args:
        pipeline: the base.
        inception: features for the similarity.
        lpips: distance for the leak.
        settings: sizes.
        seed: seed of tuners, batches and drawings.
        rates: learning rate by method; the middle one of its sweep where none is given.
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
        self.artist = Artist(pipeline, settings.inference_steps, settings.guidance)
        self.objective = Objective(pipeline.scheduler)
        self.asked = held_out()

    @cached_property
    def batches(self) -> Batches:
        """The training batches, the same for every method."""
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
        """Features of the five pictures."""
        features: Tensor = self.inception(to_pixels([render(picture.svg) for picture in training()]))
        return features

    @cached_property
    def base_leak(self) -> Tensor:
        """What the base draws where no tuner should change anything."""
        return self._draw("base-leak", list(LEAK_PROMPTS), None)

    def _draw(self, name: str, prompts: list[str], unet: Any) -> Tensor:
        path = self.folder / "drawings" / f"{name}.png"
        if not path.exists():
            pictures = self.artist.draw(prompts, seed=self.seed, unet=unet)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                to_images(torch.cat(list(pictures), dim=1)[None])[0].save(file, format="PNG")
        return read_strip(path)

    def run(self) -> list[Row]:
        """Score the true pictures, the base, and every method."""
        true_pictures = to_pixels([render(picture.svg) for picture in self.asked])
        rows: list[Row] = [
            {"method": "true pictures"} | self.score(true_pictures),
            {"method": "base, not tuned"} | self.score(self._draw("base", self.prompts, None)) | {"leak": 0.0},
        ]
        return rows + [self._method_row(method) for method in contestants(self.pipeline.unet)]

    @property
    def prompts(self) -> list[str]:
        """The held-out prompts."""
        return [picture.prompt for picture in self.asked]

    def score(self, pictures: Tensor) -> Row:
        """Score one picture per held-out prompt.

        Returns:
            `subject`: mean cosine similarity to the five training pictures; `true`: to the true picture of the same
            prompt; `prompt`: share of pictures with the background that was asked for.
        """
        features = self.inception(pictures)
        taught = torch.nn.functional.normalize(self.taught_features, dim=1)
        near = torch.nn.functional.normalize(features, dim=1) @ taught.T
        true_features = self.inception(to_pixels([render(picture.svg) for picture in self.asked]))
        kept = [
            background_fidelity(image, picture.background)
            for image, picture in zip(to_images(pictures), self.asked, strict=True)
        ]
        return {
            "subject": mean(near),
            "true": mean(similarity(features, true_features)),
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
        pictures = self._draw(slug(method.name), self.prompts, trainable.unet)
        leak = self._draw(f"{slug(method.name)}-leak", list(LEAK_PROMPTS), trainable.unet)
        row = {"method": method.name} | self.score(pictures) | {"leak": mean(self.lpips(leak, self.base_leak))}
        row |= {"learning_rate": rate, "parameters": trainable.count, "seed": self.seed} | asdict(course)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps(row, indent=1).encode())
        return row


ABOUT = (
    f"`{TOKEN} {CLASS_WORD}`: five pictures, then ten prompts that put it on backgrounds that it was never shown on. "
    "Subject: mean Inception cosine similarity to the five pictures; true: to the true picture of the same prompt; "
    "prompt: share of drawings with the background that was asked for; leak: LPIPS between tuned model and base on "
    f"{len(LEAK_PROMPTS)} prompts without the token."
)
