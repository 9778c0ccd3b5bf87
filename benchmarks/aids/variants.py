"""Tuners under comparison, and their training on equal batches."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from benchmarks.icon_style.methods import held_out_loss
from restune_diffusion import BypassConfig, SkipConfig, Tuner, attach
from restune_diffusion.training.feature_cache.tap_features import TapFeatures, predict_from_features, record_features
from restune_diffusion.training.latents.batches import Batch, Batches
from restune_diffusion.training.latents.cache import Cache
from restune_diffusion.training.losses.consistency import TunerNoise, doubled
from restune_diffusion.training.losses.objective import Objective
from restune_diffusion.tuners.configs import PartConfig
from restune_diffusion.utils.seeds import seeded

WARMUP = 0.05
LEVELS = 8
"""Noise levels of the held-out loss."""


@dataclass(frozen=True)
class Aid:
    """Consistency: its weight, and the standard deviation of the noise."""

    weight: float
    sigma: float = 1.0


@dataclass(frozen=True)
class Variant:
    """A tuner and how it is trained.

    Attributes:
        name: name of the row.
        config: part of the tuner.
        rates: learning rates to choose from.
        aids: settings of the consistency to choose from; None for none.
        batch: samples per step.
    """

    name: str
    config: PartConfig
    rates: tuple[float, ...]
    aids: tuple[Aid | None, ...] = (None,)
    batch: int = 8


@dataclass(frozen=True)
class Choice:
    """One way to train a variant."""

    variant: Variant
    rate: float
    aid: Aid | None

    @classmethod
    def all_of(cls, variant: Variant) -> list[Choice]:
        """Return all ways to train a variant."""
        return [cls(variant, rate, aid) for rate in variant.rates for aid in variant.aids]


# Rates of the tables of docs/bypass.md, where a longer list was tried.
SKIP_RATES = (1e-3,)
BYPASS_RATES = (2e-3, 5e-3)
# The forms that read all taps fit the images sooner.
ALL_TAPS_RATES = (5e-4, 1e-3)
PLAIN = BypassConfig(ratio=1.25)
# The best of five for a bypass on `openmoji` with seed 0: weights 0, 0.1, 1 and 10 with sigma 1, and this one.
PACE = (Aid(1.0, 0.5),)
VARIANTS = (
    # Smaller batches, because both take the base's gradients: the study has to fit into an hour of one processor.
    Variant("skip, batch 4", SkipConfig(), SKIP_RATES, batch=4),
    Variant("skip, batch 4, consistency (PACE)", SkipConfig(), SKIP_RATES, PACE, batch=4),
    Variant("bypass, ratio 1.25", PLAIN, BYPASS_RATES),
    Variant("bypass, ratio 1.25, consistency (PACE)", PLAIN, BYPASS_RATES, PACE),
    Variant("bypass, redundancy (after SHERL), ratio 0.5, all taps", BypassConfig(form="redundancy"), ALL_TAPS_RATES),
    Variant("bypass, mixers (after LoSA), ratio 0.5, all taps", BypassConfig(form="mixers"), ALL_TAPS_RATES),
)
"""About 380,000 parameters each."""


@dataclass
class Learner:
    """A tuner in training."""

    choice: Choice
    tuner: Tuner
    optimizer: torch.optim.Optimizer
    schedule: Any
    noise: TunerNoise | None
    seconds: float = 0.0
    """Processor time of its own computations."""
    distances: list[float] = field(default_factory=list)
    """Distance between both draws in each step, before the weight."""

    @classmethod
    def of(cls, choice: Choice, unet: Any, seed: int, steps: int) -> Learner:
        """Return a learner with a fresh tuner."""
        config, aid = choice.variant.config, choice.aid
        tuner = Tuner.for_base(unet, config, generator=torch.Generator().manual_seed(seed))
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=choice.rate, weight_decay=1e-2)
        schedule = get_scheduler("cosine", optimizer, num_warmup_steps=round(WARMUP * steps), num_training_steps=steps)
        return cls(choice, tuner, optimizer, schedule, TunerNoise(tuner, aid.sigma) if aid is not None else None)

    def step(self, batch: Batch, objective: Objective, predict: Any, seed: int, number: int) -> None:
        """Take an optimizer step; `predict` returns the prediction for a batch."""
        started = time.process_time()
        target = objective.target(batch.latents, batch.noise, batch.timesteps)
        aid = self.choice.aid
        if self.noise is None or aid is None:
            loss = objective.loss(predict(batch), target, batch.timesteps)
        else:
            rows = len(batch.latents)
            places = [2 * (number * rows + row) + draw for draw in range(2) for row in range(rows)]
            with self.noise.applied([seeded(seed, "consistency", place) for place in places]):
                one, two = predict(doubled(batch)).chunk(2)
            distance = (one - two).square().mean()
            self.distances.append(float(distance.detach()))
            loss = objective.loss(one, target, batch.timesteps) + aid.weight * distance
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.tuner.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.seconds += time.process_time() - started


def train_inside(learner: Learner, unet: Any, batches: Batches, objective: Objective, seed: int, steps: int) -> None:
    """Train a tuner that acts inside the base."""

    def predict(batch: Batch) -> torch.Tensor:
        noisy = objective.add_noise(batch.latents, batch.noise, batch.timesteps)
        predicted: torch.Tensor = unet(noisy, batch.timesteps, return_dict=False, **batch.inputs)[0]
        return predicted

    with attach(unet, learner.tuner):
        for number in range(steps):
            learner.step(batches[number], objective, predict, seed, number)


def train_beside(
    learners: Sequence[Learner], unet: Any, batches: Batches, objective: Objective, seed: int, steps: int
) -> float:
    """Train bypass tuners that share each forward pass of the base, and return the processor time of these passes."""
    taps, shared = _taps(learners), 0.0
    for number in range(steps):
        batch = batches[number]
        started = time.process_time()
        noisy = objective.add_noise(batch.latents, batch.noise, batch.timesteps)
        features = record_features(unet, taps, noisy, batch.timesteps, return_dict=False, **batch.inputs)
        shared += time.process_time() - started
        for learner in learners:
            own = learner.tuner

            def predict(each: Batch, tuner: Tuner = own) -> torch.Tensor:
                assert each.features is not None
                return predict_from_features(unet, tuner, each.features)

            learner.step(replace(batch, features=features), objective, predict, seed, number)
    return shared


@torch.no_grad()
def losses_beside(learners: Sequence[Learner], unet: Any, cache: Cache, objective: Objective) -> list[float]:
    """Return the held-out loss of each bypass tuner, as `held_out_loss` does, with one pass of the base for all."""
    latents = torch.stack([latent.mean for latent in cache.latents])
    states = torch.stack([cache.conditioning(index).states for index in range(len(cache))])
    totals = [0.0] * len(learners)
    for level in range(LEVELS):
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(10_000 + level))
        timesteps = torch.full((len(cache),), int((level + 0.5) * objective.timesteps / LEVELS))
        noisy = objective.add_noise(latents, noise, timesteps)
        features: TapFeatures = record_features(unet, _taps(learners), noisy, timesteps, states, return_dict=False)
        target = objective.target(latents, noise, timesteps)
        for number, learner in enumerate(learners):
            prediction = predict_from_features(unet, learner.tuner, features)
            totals[number] += float(objective.loss(prediction, target, timesteps)) / LEVELS
    return totals


def loss_inside(learner: Learner, unet: Any, cache: Cache, objective: Objective) -> float:
    """Return the held-out loss of a tuner that acts inside the base."""
    with attach(unet, learner.tuner):
        return held_out_loss(unet, cache, objective, levels=LEVELS)


def with_tuner(unet: Any, tuner: Tuner) -> Any:
    """Return a copy of a U-Net with a tuner attached."""
    own = copy.deepcopy(unet)
    ExitStack().enter_context(attach(own, tuner))  # never detached: the copy belongs to this tuner
    return own


def _taps(learners: Sequence[Learner]) -> set[str]:
    return {tap for learner in learners for part in learner.tuner.parts() for tap in part.taps}
