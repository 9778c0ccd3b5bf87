"""Stage that trains U-Net and text encoder, and stage that exports its latest checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from research.restune_tiny.parts.examples import Examples, caption_source
from research.restune_tiny.parts.flat import Flat
from research.restune_tiny.parts.layers import SharedTextAttention, double_by_copies
from research.restune_tiny.parts.networks import TextAndUNet, new_scheduler
from research.restune_tiny.parts.precision import TRAINING_DTYPE
from research.restune_tiny.parts.trainer import Trainer, micro_seed
from research.restune_tiny.stages.pipeline import export_pipeline, load_pipeline


@dataclass
class UNetJob:
    """Train text encoder and U-Net on stored latents."""

    settings: argparse.Namespace
    dtype: torch.dtype = TRAINING_DTYPE

    def build(self) -> nn.Module:
        """Return a new U-Net, and the pretrained text encoder if there is one."""
        captions = caption_source(self.settings)
        torch.manual_seed(self.settings.seed)
        module = TextAndUNet(len(captions.used))
        taught = self.settings.work / "text.safetensors"
        if self.settings.start:
            load_pipeline(module, self.settings.start, captions.used)
        elif taught.exists():
            module.text_encoder.load_state_dict(load_file(taught))
        return module

    def prepare(self, module: Any) -> Callable[[int, int], dict[str, float]]:
        """Load the latents and return a function that runs one micro-batch."""
        settings, draw = self.settings, Examples(self.settings)
        module.unet.set_attn_processor(SharedTextAttention())
        double_by_copies(module)
        signal = new_scheduler().alphas_cumprod
        forward = torch.compile(module) if settings.compile else module
        repeats = settings.repeats

        def run(step: int, index: int) -> dict[str, float]:
            seed = micro_seed(settings.seed + 1, step, index)
            latents, ids, _ = draw.batch(seed, settings.batch // repeats)
            clean = latents.repeat_interleave(repeats, 0)
            loss, error = denoising_loss(lambda noisy, timesteps: forward(noisy, timesteps, ids), clean, signal)
            loss.backward()
            return {"loss": float(loss.detach()), "error": error}

        return run


def denoising_loss(predict: Callable[[Tensor, Tensor], Tensor], clean: Tensor, signal: Tensor) -> tuple[Tensor, float]:
    """Return the weighted loss and the mean squared error of predicted velocities.

    Args:
        predict: function of noisy latents in the training dtype and N timesteps to velocities, N x 16 x 8 x 8.
        clean: scaled latents, N x 16 x 8 x 8.
        signal: cumulative alphas at each of the 1,000 timesteps.
    """
    size = len(clean)
    # Timesteps evenly spread in random order: less gradient noise than independent sampling.
    timesteps = ((torch.randperm(size) + torch.rand(size)) * (1000 / size)).long().clamp(max=999)
    alpha = signal[timesteps][:, None, None, None]
    noise = torch.randn_like(clean)
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    wanted = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    found = predict(noisy.to(TRAINING_DTYPE), timesteps).float()
    errors = (found - wanted).square().mean((1, 2, 3))
    # The weighting of v-prediction, reduced at low noise (as in min-SNR): captions matter at high noise, and vanishing
    # weights there would leave them unlearned.
    total = 1 / (1 - alpha.flatten())
    loss = (errors * total.clamp(max=5) / total).mean()
    return loss, float(errors.detach().mean())


def train_unet(arguments: argparse.Namespace) -> None:
    """Train text encoder and U-Net, with regular exports of the pipeline."""
    train_exporting(UNetJob(arguments), ("loss", "error"))


def train_exporting(job: UNetJob, keys: Sequence[str]) -> None:
    """Run a job that trains text encoder and U-Net, with metrics under these keys and regular pipeline exports."""
    settings = job.settings
    used = caption_source(settings).used
    trainer = Trainer(job, settings, keys)
    trainer.run(lambda weights: export_pipeline(weights, used, settings), settings.export_every)


def export_checkpoint(arguments: argparse.Namespace) -> None:
    """Write the pipeline of the latest checkpoint, with the improved decoder if there is one."""
    flat = Flat(UNetJob(arguments).build())
    averaged = load_file(arguments.work / "unet-checkpoint" / "state.safetensors")["ema"]
    weights = {name: view.clone() for name, view in flat.views(averaged).items()}
    export_pipeline(weights, caption_source(arguments).used, arguments)
