"""The VAE and the two stages that train it: the whole VAE, and only its decoder."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from research.restune_tiny.parts.folders import replace_folder
from research.restune_tiny.parts.icons import Icons, load_icons, on_background, shifted
from research.restune_tiny.parts.layers import double_by_copies
from research.restune_tiny.parts.precision import TRAINING_DTYPE
from research.restune_tiny.parts.trainer import Trainer, micro_seed
from research.restune_tiny.stages.redraw import REDRAWN, Redrawn
from restune_diffusion.evaluation import Lpips

# Stable Diffusion's factor: latents are normalized to its inverse, so missing scaling is easy to notice.
SCALING_FACTOR = 0.18215


def new_vae() -> AutoencoderKL:
    """Return a small VAE: 64 px images to 8x8 latents of 16 channels."""
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 96, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=16,
        sample_size=64,
        scaling_factor=1.0,
    )
    # Initialize as a nearly linear, nearly noiseless VAE: with the usual initialization, latents stay empty for long.
    for name, parameter in vae.named_parameters():
        if name.endswith(("conv2.weight", "to_out.0.weight")):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 4:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif parameter.ndim == 1 and name.endswith(".bias") and "norm" not in name and "attentions" not in name:
            nn.init.zeros_(parameter)
    nn.init.normal_(vae.decoder.conv_out.weight, std=0.02)
    nn.init.constant_(vae.quant_conv.bias[16:], -6.0)
    return vae


def vae_batch(icons: Icons, size: int) -> Tensor:
    """Return icons sampled by the square root of their weight, slightly shifted, a third on random plain colors."""
    picks = torch.multinomial(icons.weights.sqrt(), size, replacement=True)
    dy, dx = (int(value) for value in torch.randint(-3, 4, (2,)))
    colour = torch.where(torch.rand(size, 1) < 0.67, torch.ones(size, 3), torch.rand(size, 3))
    return on_background(shifted(icons.pixels[picks], dy, dx), colour)


def edges(image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the differences of neighboring pixels, horizontal and vertical."""
    return image[..., 1:] - image[..., :-1], image[..., 1:, :] - image[..., :-1, :]


def reconstruction_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Return color and edge errors at three scales: a cheap substitute for a perceptual loss."""
    loss = F.l1_loss(found, wanted) + F.mse_loss(found, wanted)
    for _ in range(3):
        loss = loss + 0.5 * sum(F.l1_loss(a, b) for a, b in zip(edges(found), edges(wanted), strict=True))
        found, wanted = F.avg_pool2d(found, 2), F.avg_pool2d(wanted, 2)
        loss = loss + 0.5 * F.l1_loss(found, wanted)
    return loss


class Perceptual:
    """Weighted LPIPS (arXiv 1801.03924) of images in -1..1, upscaled by two to resolve strokes; 0 for weight 0."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.lpips = Lpips() if weight else None

    def __call__(self, found: Tensor, wanted: Tensor) -> Tensor:
        """Return the weighted mean distance."""
        if self.lpips is None:
            return torch.zeros(())
        large = [F.interpolate(image / 2 + 0.5, scale_factor=2, mode="bilinear") for image in (found, wanted)]
        return self.weight * self.lpips(*large).mean()


class VaeStep(nn.Module):
    """Compiled part of a VAE step: pixels to reconstruction and posterior."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return reconstruction, mean and log variance."""
        mean, logvar = self.vae.quant_conv(self.vae.encoder(pixels)).chunk(2, dim=1)
        logvar = logvar.clamp(-10, 4)
        latents = mean + noise * torch.exp(0.5 * logvar)
        return self.vae.decoder(self.vae.post_quant_conv(latents)), mean, logvar


@dataclass
class VaeJob:
    """Train the VAE on shifted icons over plain colors."""

    settings: argparse.Namespace
    dtype: torch.dtype = TRAINING_DTYPE

    def build(self) -> nn.Module:
        """Return a new VAE."""
        torch.manual_seed(self.settings.seed)
        vae: nn.Module = new_vae()
        return vae

    def prepare(self, module: nn.Module) -> Callable[[int, int], dict[str, float]]:
        """Load the icons and return a function that runs one micro-batch."""
        settings, icons = self.settings, load_icons(self.settings.icons)
        double_by_copies(module)
        forward: Callable[..., Any] = VaeStep(module)
        forward = torch.compile(forward) if settings.compile else forward

        def run(step: int, index: int) -> dict[str, float]:
            torch.manual_seed(micro_seed(settings.seed + 1, step, index))
            pixels = vae_batch(icons, settings.batch)
            noise = torch.randn(settings.batch, 16, 8, 8)
            inputs = (tensor.to(TRAINING_DTYPE, memory_format=torch.channels_last) for tensor in (pixels, noise))
            found, mean, logvar = (tensor.float() for tensor in forward(*inputs))
            loss = reconstruction_loss(found, pixels)
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
            (loss + settings.kl * min(1.0, step / 500) * kl).backward()
            numbers = {"loss": loss, "l1": F.l1_loss(found, pixels), "kl": kl, "std": mean.std()}
            return {key: float(value.detach()) for key, value in numbers.items()}

        return run


def train_vae(arguments: argparse.Namespace) -> None:
    """Train the VAE and write it to `<work>/vae`."""

    def export(weights: dict[str, Tensor]) -> None:
        vae = new_vae()
        vae.load_state_dict(weights)
        temporary = arguments.work / "vae.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        vae.save_pretrained(temporary)
        replace_folder(temporary, arguments.work / "vae")

    Trainer(VaeJob(arguments), arguments, ("loss", "l1", "kl", "std")).run(export, export_every=250)


@dataclass
class DecoderJob:
    """Train only the decoder: the encoder, and therefore all stored latents, are frozen.

    The remaining errors are a few hundredths, whose signs are wrong in bfloat16: its gradients diverge.
    """

    settings: argparse.Namespace
    dtype: torch.dtype = torch.float32

    def build(self) -> nn.Module:
        """Return the VAE with a frozen encoder."""
        vae: nn.Module = AutoencoderKL.from_pretrained(self.settings.work / "vae-normalised")
        for name, parameter in vae.named_parameters():
            parameter.requires_grad_(name.startswith(("decoder", "post_quant_conv")))
        return vae

    def prepare(self, module: Any) -> Callable[[int, int], dict[str, float]]:
        """Load the icons and return a function that runs one micro-batch."""
        settings, icons = self.settings, load_icons(self.settings.icons)
        double_by_copies(module)
        redrawn = Redrawn(settings, icons) if (settings.work / REDRAWN).exists() else None
        count = settings.batch * 3 // 8 if redrawn else 0
        perceptual = Perceptual(settings.perceptual_weight)

        def run(step: int, index: int) -> dict[str, float]:
            torch.manual_seed(micro_seed(settings.seed + 2, step, index))
            pixels = vae_batch(icons, settings.batch - count)
            with torch.no_grad():
                latents = module.encode(pixels).latent_dist.sample()
                # Latents from the U-Net have small errors: train the decoder to be robust to them.
                level = 0.12 / SCALING_FACTOR * torch.rand(len(pixels), 1, 1, 1)
                latents = latents + level * torch.randn(latents.shape)
            if redrawn:
                drawn, wanted = redrawn.batch(count)
                latents, pixels = torch.cat([latents, drawn / SCALING_FACTOR]), torch.cat([pixels, wanted])
            found = module.decode(latents).sample
            loss = reconstruction_loss(found, pixels) + perceptual(found, pixels)
            loss.backward()
            return {"loss": float(loss.detach()), "l1": float(F.l1_loss(found.detach(), pixels))}

        return run


def train_decoder(arguments: argparse.Namespace) -> None:
    """Improve the decoder in `<work>/vae-normalised`."""

    def export(weights: dict[str, Tensor]) -> None:
        vae = AutoencoderKL.from_pretrained(arguments.work / "vae-normalised")
        decoder = {key: value for key, value in weights.items() if not key.startswith(("encoder", "quant_conv"))}
        vae.load_state_dict(decoder, strict=False)
        vae.save_pretrained(arguments.work / "vae-final.tmp")
        replace_folder(arguments.work / "vae-final.tmp", arguments.work / "vae-final")

    Trainer(DecoderJob(arguments), arguments, ("loss", "l1")).run(export, export_every=100)


@torch.no_grad()
def normalise(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Normalize the latents per channel by folding mean and standard deviation into the 1x1 convolutions."""
    channels, target = mean.shape[0], 1 / SCALING_FACTOR
    gain = target / std
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] *= gain[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) * gain
    quant.bias[channels:] += 2 * gain.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight /= gain[None, :, None, None]
    vae.register_to_config(scaling_factor=SCALING_FACTOR)
