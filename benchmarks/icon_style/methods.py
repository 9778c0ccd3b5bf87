"""Methods under comparison: ways to fine-tune a copy of the base's U-Net, all trained by one loop on equal batches."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from peft import LoraConfig
from torch import nn

from restune_diffusion import BypassConfig, ResConfig, SkipConfig, Tuner, attach
from restune_diffusion.backbones import describe_base
from restune_diffusion.training.latents.batches import Batch, Batches
from restune_diffusion.training.latents.cache import Cache
from restune_diffusion.training.losses.objective import Objective
from restune_diffusion.tuners.configs import PartConfig

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
CUSTOMARY_RANK = 16
SKIP_RATES = (5e-4, 1e-3, 2e-3)
RES_RATES = (2e-4, 5e-4, 1e-3)
BYPASS_RATES = (2e-3, 5e-3, 1e-2)
LATE_RATES = (1e-3, 2e-3, 5e-3)
LATE_TRANSFORMER_BLOCKS = (1, 2, 3, 6)


@dataclass
class Trainable:
    """A copy of the base's U-Net and its trained parameters, which may belong to a tuner."""

    unet: Any
    parameters: list[nn.Parameter]

    @property
    def count(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters)


Prepare = Callable[[Any, int], Trainable]


@dataclass(frozen=True)
class Method:
    """A method: name, function that prepares a copy of the U-Net with a seed, and learning rates to try."""

    name: str
    prepare: Prepare
    learning_rates: tuple[float, ...]

    def start(self, unet: Any, seed: int) -> Trainable:
        """Return a prepared copy of the U-Net; only the method's parameters are trainable."""
        own = copy.deepcopy(unet).requires_grad_(False).eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.prepare(own, seed)


def tuner(*configs: PartConfig) -> Prepare:
    """Return a function that attaches a tuner with these parts."""

    def prepare(unet: Any, seed: int) -> Trainable:
        fresh = Tuner.for_base(unet, *configs, generator=torch.Generator().manual_seed(seed))
        attach(unet, fresh).__enter__()  # never detached: the copy belongs to this tuner
        return Trainable(unet, list(fresh.parameters()))

    return prepare


def lora(rank: int, targets: tuple[str, ...]) -> Prepare:
    """Return a function that adds PEFT's LoRA as diffusers' training scripts do."""

    def prepare(unet: Any, seed: int) -> Trainable:
        unet.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets))
        )
        return Trainable(unet, [parameter for parameter in unet.parameters() if parameter.requires_grad])

    return prepare


def full(unet: Any, seed: int) -> Trainable:
    """Train all weights, as in DreamBooth without LoRA."""
    return Trainable(unet, list(unet.requires_grad_(True).parameters()))


def biases(unet: Any, seed: int) -> Trainable:
    """Train the biases (BitFit, arXiv 2106.10199)."""
    chosen = [parameter for name, parameter in unet.named_parameters() if name.endswith(".bias")]
    return Trainable(unet, [parameter.requires_grad_(True) for parameter in chosen])


def common_budget(unet: Any) -> int:
    """Return the parameter budget of all methods: the skip tuner's parameter count."""
    return Tuner.empty((SkipConfig(),), describe_base(unet)).num_parameters()


def bypass_ratio(unet: Any, budget: int) -> float:
    """Return the bypass ratio, in sixteenths, whose parameter count is nearest to a budget."""
    base = describe_base(unet)

    def miss(ratio: float) -> int:
        return abs(Tuner.empty((BypassConfig(ratio=ratio),), base).num_parameters() - budget)

    return min((step / 16 for step in range(2, 33)), key=miss)


def res_width(unet: Any, budget: int, config: ResConfig | None = None) -> int:
    """Return the adapter width whose parameter count is nearest to a budget; without a config, of dual res tuners.

    The parameter count is linear in the width.
    """
    base, config = describe_base(unet), config or ResConfig()
    least, next_one = (
        Tuner.empty((config.model_copy(update={"width": width}),), base).num_parameters() for width in (2, 3)
    )
    return min(max(2, 2 + round((budget - least) / (next_one - least))), 128)


def lora_rank(unet: Any, targets: tuple[str, ...], budget: int) -> int:
    """Return the LoRA rank whose parameter count, which is proportional to the rank, is nearest to a budget."""
    return max(1, round(budget / Method("", lora(1, targets), ()).start(unet, 0).count))


def contestants(unet: Any) -> list[Method]:
    """Return all methods, ours and the peers, with the skip tuner's parameter count as the common budget."""
    budget = common_budget(unet)
    ratio, both = bypass_ratio(unet, budget), ATTENTION + FEED_FORWARD
    attention, wide = lora_rank(unet, ATTENTION, budget), lora_rank(unet, both, budget)
    width, rank = res_width(unet, budget), CUSTOMARY_RANK
    alone = ResConfig(self_attention=None)
    alone = alone.model_copy(update={"width": res_width(unet, budget, alone)})
    return [
        Method("skip tuner", tuner(SkipConfig()), SKIP_RATES),
        Method(f"res tuner, width {width}", tuner(ResConfig(width=width)), RES_RATES),
        Method(f"res tuner, feed-forward alone, width {alone.width}", tuner(alone), RES_RATES),
        Method(f"bypass tuner, ratio {ratio:g}", tuner(BypassConfig(ratio=ratio)), BYPASS_RATES),
        Method(f"LoRA r={attention}, attention", lora(attention, ATTENTION), (2e-4, 5e-4, 1e-3)),
        Method(f"LoRA r={wide}, attention + feed-forward", lora(wide, both), (2e-4, 5e-4, 1e-3)),
        Method(f"LoRA r={rank}, attention", lora(rank, ATTENTION), (2e-4, 5e-4, 1e-3)),
        Method(f"LoRA r={rank}, attention + feed-forward", lora(rank, both), (2e-4, 5e-4, 1e-3)),
        Method("full fine-tuning", full, (1e-5, 3e-5, 1e-4)),
        Method("biases only", biases, (2e-3, 5e-3, 1e-2)),
    ]


def bypass_variants(unet: Any) -> list[Method]:
    """Return the variants compared in `docs/bypass.md`: taps and ratios of a bypass, and gradient depths."""
    blocks = len(unet.up_blocks)
    width = res_width(unet, common_budget(unet))
    plain = {
        "bypass, ratio 0.5": BypassConfig(),
        "bypass, ratio 0.25": BypassConfig(ratio=0.25),
        "bypass, ratio 1, taps: last up block": BypassConfig(ratio=1, taps=(f"up.{blocks - 1}",)),
        "bypass, ratio 0.125, taps: all": BypassConfig(ratio=0.125, taps=("*",)),
    }
    alone = {f"skip, gradient depth {depth}": SkipConfig(grad_depth=depth) for depth in range(1, blocks)}
    late = {
        f"res, gradient depth {depth}": ResConfig(width=width, grad_depth=depth) for depth in LATE_TRANSFORMER_BLOCKS
    }
    late["res, gradient depth 1, feed-forward alone"] = ResConfig(width=width, grad_depth=1, self_attention=None)
    return [
        *(Method(name, tuner(config), BYPASS_RATES) for name, config in plain.items()),
        *(Method(name, tuner(config), SKIP_RATES) for name, config in alone.items()),
        *(Method(name, tuner(config), LATE_RATES) for name, config in late.items()),
    ]


@dataclass(frozen=True)
class Course:
    """Length of a training run; seconds are processor time of this process."""

    steps: int
    seconds: float
    seconds_per_step: float


def tune(
    trainable: Trainable, batches: Batches, objective: Objective, *, steps: int, learning_rate: float, warmup: float
) -> Course:
    """Train with AdamW, a short warm-up and cosine decay to zero.

    Args:
        trainable: U-Net and trained parameters.
        batches: training batches, the same for every method.
        objective: training objective of the base.
        steps: optimizer steps.
        learning_rate: peak learning rate.
        warmup: share of the steps before the peak.
    """
    optimizer = torch.optim.AdamW(trainable.parameters, lr=learning_rate, weight_decay=1e-2)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=round(warmup * steps), num_training_steps=steps)
    durations = []
    for step in range(steps):
        batch = batches[step]
        # Processor time, not wall-clock time: load from other programs is not a property of the method.
        started = time.process_time()
        loss = batch_loss(trainable.unet, batch, objective)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        durations.append(time.process_time() - started)
    # The median: other programs still slow some steps through the processor's caches.
    typical = statistics.median(durations)
    return Course(steps, typical * steps, typical)


def batch_loss(unet: Any, batch: Batch, objective: Objective) -> torch.Tensor:
    """Return the denoising loss of one batch."""
    noisy = objective.add_noise(batch.latents, batch.noise, batch.timesteps)
    target = objective.target(batch.latents, batch.noise, batch.timesteps)
    prediction = unet(noisy, batch.timesteps, return_dict=False, **batch.inputs)[0]
    return objective.loss(prediction, target, batch.timesteps)


@torch.no_grad()
def held_out_loss(unet: Any, cache: Cache, objective: Objective, *, levels: int = 8) -> float:
    """Return the mean denoising loss over all images and noise levels, with noise that is not used in training."""
    latents = torch.stack([latent.mean for latent in cache.latents])
    states = torch.stack([cache.conditioning(index).states for index in range(len(cache))])
    total = 0.0
    for level in range(levels):
        generator = torch.Generator().manual_seed(10_000 + level)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.full((len(cache),), int((level + 0.5) * objective.timesteps / levels))
        prediction = unet(objective.add_noise(latents, noise, timesteps), timesteps, states, return_dict=False)[0]
        target = objective.target(latents, noise, timesteps)
        total += float(objective.loss(prediction, target, timesteps)) / levels
    return total
