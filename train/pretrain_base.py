"""Pretrain `restune-tiny`, the small Stable Diffusion checkpoint that ships with the package, from icon pictures.

Stages, each resumable (interrupt it and run the same command again):
    python train/prepare_icons.py data/icons --download
    python train/pretrain_base.py vae data/icons work --compile
    python train/pretrain_base.py latents data/icons work
    python train/pretrain_base.py text data/icons work --tokenizer TOKENIZER
    python train/pretrain_base.py unet data/icons work --tokenizer TOKENIZER --export work/export
    python train/pretrain_base.py decoder data/icons work
    python train/pretrain_base.py export data/icons work --tokenizer TOKENIZER --export work/export
    python train/pretrain_base.py samples work/export samples.png

TOKENIZER is a folder with the standard CLIP tokenizer, such as restune_diffusion/assets/restune-tiny/tokenizer.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SETS = ("noto", "twemoji", "fluent-emoji-flat", "emojione", "noto-v1")


class Flat:
    """One flat tensor as the storage of all of a module's parameters."""

    def __init__(self, module: nn.Module) -> None:
        self.names, self.shapes, self.offsets = [], [], []
        self.size = 0
        for name, parameter in module.named_parameters():
            self.names.append(name)
            self.shapes.append(parameter.shape)
            self.offsets.append(self.size)
            self.size += -(-parameter.numel() // 32) * 32  # aligned for the convolution kernels

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The parts of a flat tensor by parameter name."""
        slices = zip(self.names, self.shapes, self.offsets, strict=True)
        return {name: flat[start : start + shape.numel()].view(shape) for name, shape, start in slices}

    @torch.no_grad()
    def gather(self, module: nn.Module) -> Tensor:
        """A flat float32 copy of a module's parameters."""
        flat = torch.zeros(self.size)
        views = self.views(flat)
        for name, parameter in module.named_parameters():
            views[name].copy_(parameter)
        return flat

    def bind(self, module: nn.Module, values: Tensor, gradients: Tensor) -> None:
        """Let a module's parameters and gradients live in flat tensors."""
        value_views, gradient_views = self.views(values), self.views(gradients)
        for name, parameter in module.named_parameters():
            parameter.data, parameter.grad = value_views[name], gradient_views[name]


class Job(Protocol):
    """What a training stage supplies; instances travel to the worker processes."""

    def build(self) -> nn.Module:
        """The module to train, freshly initialised."""

    def prepare(self, module: nn.Module) -> Callable[[int, int], dict[str, float]]:
        """Load data; returns the function that adds the gradient of micro-batch (step, index) and reports numbers."""


@dataclass
class Shared:
    """What the processes share. Each worker takes the next micro-batch when it is free, so that a core busy with
    other work slows training by its own share only; threads within one process would all wait for it."""

    values: Tensor
    gradients: Tensor
    reports: Tensor
    counts: Tensor
    step: Any
    taken: Any
    micro: int
    gate: Any


def work(rank: int, job: Job, shared: Shared) -> None:
    """A worker: compute gradients of micro-batches until the trainer goes away."""
    torch.set_num_threads(1)
    module = job.build().to(torch.bfloat16)
    flat = Flat(module)
    gradients = torch.zeros(flat.size, dtype=torch.bfloat16)
    flat.bind(module, shared.values, gradients)
    run = job.prepare(module)
    for turn in range(shared.reports.shape[0]):
        if turn == rank:  # one after another: the first compiles, the others find it in the compiler's cache
            run(0, 0)
        shared.gate.wait(1200)
    while True:
        shared.gate.wait(1200)
        shared.counts[rank] = 0
        while (index := take(shared)) < shared.micro:
            gradients.zero_()
            numbers = torch.tensor(list(run(shared.step.value, index).values()), dtype=torch.float64)
            if shared.counts[rank] == 0:
                shared.gradients[rank].copy_(gradients)
                shared.reports[rank] = numbers
            else:
                shared.gradients[rank].add_(gradients)
                shared.reports[rank] += numbers
            shared.counts[rank] += 1
        shared.gate.wait(1200)


def take(shared: Shared) -> int:
    """The next micro-batch nobody works on."""
    with shared.taken.get_lock():
        index: int = shared.taken.value
        shared.taken.value = index + 1
    return index


def shared_copy(tensor: Tensor) -> Tensor:
    """The tensor in memory that all processes see."""
    shared: Tensor = tensor.share_memory_()
    return shared


class Trainer:
    """Float32 weights, Adam, moving average and checkpoints over bfloat16 workers, one a core."""

    def __init__(self, job: Job, settings: argparse.Namespace, keys: Sequence[str]) -> None:
        module = job.build()
        self.flat, self.keys, self.settings, self.steps = Flat(module), keys, settings, 0
        self.master = nn.Parameter(self.flat.gather(module))
        self.ema = self.master.detach().clone()
        self.first_moment, self.second_moment = torch.zeros_like(self.ema), torch.zeros_like(self.ema)
        self.checkpoint = settings.work / f"{settings.stage}-checkpoint"
        if self.checkpoint.exists():
            self.load()
        self.optimizer = torch.optim.Adam([self.master], betas=(0.9, 0.99), fused=True)
        moments = {"exp_avg": self.first_moment, "exp_avg_sq": self.second_moment}
        self.optimizer.state[self.master] = {"step": torch.tensor(float(self.steps)), **moments}
        context = mp.get_context("spawn")
        workers = settings.workers
        self.shared = Shared(
            values=shared_copy(self.master.detach().to(torch.bfloat16)),
            gradients=shared_copy(torch.zeros(workers, self.flat.size)),
            reports=shared_copy(torch.zeros(workers, len(keys), dtype=torch.float64)),
            counts=shared_copy(torch.zeros(workers, dtype=torch.int64)),
            step=context.Value("l", 0),
            taken=context.Value("l", 0),
            micro=settings.micro,
            gate=context.Barrier(workers + 1),
        )
        for rank in range(workers):
            context.Process(target=work, args=(rank, job, self.shared), daemon=True).start()
        for _ in range(workers):
            self.shared.gate.wait(1200)

    @torch.no_grad()
    def step(self) -> dict[str, float]:
        """One optimizer step; returns the workers' numbers and the gradient's norm."""
        self.shared.step.value, self.shared.taken.value = self.steps, 0
        self.shared.gate.wait(1200)
        self.shared.gate.wait(1200)
        busy = [rank for rank, count in enumerate(self.shared.counts.tolist()) if count]
        gradient = self.shared.gradients[busy[0]].clone()
        for rank in busy[1:]:
            gradient += self.shared.gradients[rank]
        settings, norm = self.settings, float(gradient.norm()) / self.shared.micro
        gradient *= min(1.0, settings.clip / (norm + 1e-6)) / self.shared.micro
        self.steps += 1
        lr = learning_rate(self.steps, settings.steps, settings.lr, settings.warmup)
        self.optimizer.param_groups[0]["lr"] = lr
        self.master.grad = gradient
        self.optimizer.step()
        self.ema.lerp_(self.master, 1 - min(settings.ema, (1 + self.steps) / (10 + self.steps)))
        self.shared.values.copy_(self.master)
        reports = self.shared.reports[busy].sum(0) / self.shared.micro
        numbers = dict(zip(self.keys, reports.tolist(), strict=True))
        return numbers | {"norm": norm, "lr": lr}

    def averaged(self) -> dict[str, Tensor]:
        """The moving average by parameter name."""
        return {name: view.clone() for name, view in self.flat.views(self.ema).items()}

    def save(self) -> None:
        """Write a checkpoint that is complete or absent. A micro-batch's randomness follows from its step and index,
        so the step is all there is to know about it."""
        temporary = self.checkpoint.with_name(self.checkpoint.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tensors = {"master": self.master.detach(), "ema": self.ema}
        moments = {"first_moment": self.first_moment, "second_moment": self.second_moment}
        save_file(tensors | moments, temporary / "state.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": self.steps}))
        replace_folder(temporary, self.checkpoint)

    @torch.no_grad()
    def load(self) -> None:
        """Go on where a checkpoint stands."""
        for name, tensor in load_file(self.checkpoint / "state.safetensors").items():
            getattr(self, name).copy_(tensor)
        self.steps = json.loads((self.checkpoint / "state.json").read_text())["step"]

    def run(self, export: Callable[[dict[str, Tensor]], None], export_every: int) -> None:
        """Train to the last step, printing, saving and exporting on the way."""
        started, first, settings = time.time(), self.steps, self.settings
        while self.steps < settings.steps:
            numbers = self.step()
            if self.steps % settings.print_every == 0:
                speed = (self.steps - first) * settings.micro * settings.batch / (time.time() - started)
                text = " ".join(f"{key} {value:.4g}" for key, value in numbers.items())
                print(f"{time.strftime('%H:%M:%S')} step {self.steps} {text} {speed:.0f} images/s", flush=True)
            if self.steps % export_every == 0 or self.steps >= settings.steps:
                self.save()
                export(self.averaged())


def replace_folder(new: Path, folder: Path) -> None:
    """Put a finished folder in another's place; a reader finds one of the two."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warmup, then a cosine down to a fiftieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)


@dataclass
class Icons:
    """All pictures (uint8 RGBA), with one record of captions and weight each."""

    pixels: Tensor
    records: list[dict[str, Any]]
    weights: Tensor


def load_icons(folder: Path) -> Icons:
    """Read what `prepare_icons.py` wrote."""
    pixels, records = [], []
    for name in SETS:
        pixels.append(torch.from_numpy(np.load(folder / f"{name}.npy", allow_pickle=False)))
        about = json.loads((folder / f"{name}.json").read_text())
        records += [icon | {"set": name, "style": about["style"]} for icon in about["icons"]]
    weights = torch.tensor([record["weight"] for record in records])
    return Icons(torch.cat(pixels), records, weights)


def on_background(rgba: Tensor, colour: Tensor) -> Tensor:
    """Lay N RGBA pictures (N, H, W, 4; bytes) over plain colours (N, 3; 0..1); the result is N, 3, H, W in -1..1."""
    picture = rgba.float().permute(0, 3, 1, 2) / 255
    alpha = picture[:, 3:]
    return (picture[:, :3] * alpha + colour[:, :, None, None] * (1 - alpha)) * 2 - 1


def shifted(rgba: Tensor, dy: int, dx: int) -> Tensor:
    """Move pictures by whole pixels, filling with transparency."""
    return torch.roll(F.pad(rgba, (0, 0, 8, 8, 8, 8)), (dy, dx), (1, 2))[:, 8:-8, 8:-8]


def double_by_copies(module: nn.Module) -> None:
    """Upsample by plain copies: PyTorch 2.13's CPU compiler loses the gradient of large nearest interpolations."""

    def double(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        count, channels, height, width = inputs[0].shape
        copies = inputs[0][:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2)
        return (copies.reshape(count, channels, 2 * height, 2 * width), *inputs[1:])

    for part in module.modules():
        if isinstance(part, Upsample2D):
            part.interpolate = False
            part.register_forward_pre_hook(double)


# --- autoencoder -----------------------------------------------------------------------------------------------


def new_vae() -> AutoencoderKL:
    """A small autoencoder: 64 px to 8x8 latents of 16 channels."""
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
    # Start as a nearly linear, nearly noiseless autoencoder: from the usual start the latents carry nothing for long.
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
    """Icons by the square root of their weight, slightly shifted, a third of them on random plain colours."""
    picks = torch.multinomial(icons.weights.sqrt(), size, replacement=True)
    dy, dx = (int(value) for value in torch.randint(-3, 4, (2,)))
    colour = torch.where(torch.rand(size, 1) < 0.67, torch.ones(size, 3), torch.rand(size, 3))
    return on_background(shifted(icons.pixels[picks], dy, dx), colour)


def edges(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, across and down."""
    return picture[..., 1:] - picture[..., :-1], picture[..., 1:, :] - picture[..., :-1, :]


def reconstruction_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Colour and outline errors at three scales: a cheap stand-in for a perceptual loss."""
    loss = F.l1_loss(found, wanted) + F.mse_loss(found, wanted)
    for _ in range(3):
        loss = loss + 0.5 * sum(F.l1_loss(a, b) for a, b in zip(edges(found), edges(wanted), strict=True))
        found, wanted = F.avg_pool2d(found, 2), F.avg_pool2d(wanted, 2)
        loss = loss + 0.5 * F.l1_loss(found, wanted)
    return loss


class VaeStep(nn.Module):
    """The part of an autoencoder step that is compiled: pixels to reconstruction and posterior."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode, sample and decode."""
        mean, logvar = self.vae.quant_conv(self.vae.encoder(pixels)).chunk(2, dim=1)
        logvar = logvar.clamp(-10, 4)
        latents = mean + noise * torch.exp(0.5 * logvar)
        return self.vae.decoder(self.vae.post_quant_conv(latents)), mean, logvar


@dataclass
class VaeJob:
    """Train the autoencoder on shifted icons over plain colours."""

    settings: argparse.Namespace

    def build(self) -> nn.Module:
        """A fresh autoencoder."""
        torch.manual_seed(self.settings.seed)
        vae: nn.Module = new_vae()
        return vae

    def prepare(self, module: nn.Module) -> Callable[[int, int], dict[str, float]]:
        """Load the icons; the function returned runs one micro-batch."""
        settings, icons = self.settings, load_icons(self.settings.icons)
        double_by_copies(module)
        forward: Callable[..., Any] = VaeStep(module)
        forward = torch.compile(forward) if settings.compile else forward

        def run(step: int, index: int) -> dict[str, float]:
            torch.manual_seed((settings.seed + 1) * 1_000_003 + step * 64 + index)
            pixels = vae_batch(icons, settings.batch)
            noise = torch.randn(settings.batch, 16, 8, 8)
            inputs = (tensor.to(torch.bfloat16, memory_format=torch.channels_last) for tensor in (pixels, noise))
            found, mean, logvar = (tensor.float() for tensor in forward(*inputs))
            loss = reconstruction_loss(found, pixels)
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
            (loss + settings.kl * min(1.0, step / 500) * kl).backward()
            numbers = {"loss": loss, "l1": F.l1_loss(found, pixels), "kl": kl, "std": mean.std()}
            return {key: float(value.detach()) for key, value in numbers.items()}

        return run


def train_vae(arguments: argparse.Namespace) -> None:
    """Train the autoencoder and write it to `<work>/vae`."""

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
    """Go on with the decoder alone: the encoder, and with it all stored latents, stays as it is."""

    settings: argparse.Namespace

    def build(self) -> nn.Module:
        """The autoencoder with a frozen encoder."""
        vae: nn.Module = AutoencoderKL.from_pretrained(self.settings.work / "vae-normalised")
        for name, parameter in vae.named_parameters():
            parameter.requires_grad_(name.startswith(("decoder", "post_quant_conv")))
        return vae

    def prepare(self, module: Any) -> Callable[[int, int], dict[str, float]]:
        """Load the icons; the function returned runs one micro-batch."""
        settings, icons = self.settings, load_icons(self.settings.icons)
        double_by_copies(module)

        def run(step: int, index: int) -> dict[str, float]:
            torch.manual_seed((settings.seed + 2) * 1_000_003 + step * 64 + index)
            pixels = vae_batch(icons, settings.batch)
            with torch.no_grad():
                latents = module.encode(pixels.to(torch.bfloat16)).latent_dist.sample()
                # What the U-Net draws is never quite a picture's latents: learn to see past small errors.
                level = 0.12 / SCALING_FACTOR * torch.rand(settings.batch, 1, 1, 1)
                latents = latents + (level * torch.randn(latents.shape)).to(latents.dtype)
            found = module.decode(latents).sample.float()
            loss = reconstruction_loss(found, pixels)
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


# --- latents ---------------------------------------------------------------------------------------------------

COLOURS = {
    "white": (255, 255, 255), "black": (25, 25, 28), "grey": (150, 152, 156), "red": (214, 64, 60),
    "orange": (240, 150, 60), "yellow": (248, 214, 90), "green": (90, 170, 90), "blue": (74, 128, 214),
    "light blue": (170, 210, 242), "purple": (140, 96, 190), "pink": (242, 160, 190), "brown": (140, 100, 70),
}  # fmt: skip
# How often each stored variant of a picture is shown: as drawn, shifted, smaller, on a colour.
VARIANT_WEIGHTS = (0.5, 0.22, 0.14, 0.14)
# Stable Diffusion's own factor: latents are normalised to its inverse, so forgetting to scale them shows.
SCALING_FACTOR = 0.18215
PART = 400


def smaller(rgba: Tensor, side: int) -> Tensor:
    """A picture shrunk into the middle of its frame."""
    image = Image.fromarray(rgba.numpy()).convert("RGBa").resize((side, side), Image.Resampling.LANCZOS)
    frame = Image.new("RGBA", (rgba.shape[1], rgba.shape[0]))
    frame.paste(image.convert("RGBA"), ((rgba.shape[1] - side) // 2, (rgba.shape[0] - side) // 2))
    return torch.from_numpy(np.array(frame))


def variants(rgba: Tensor, generator: torch.Generator) -> tuple[Tensor, list[int]]:
    """The variants of one picture (V, 3, H, W) and the index of each one's background colour."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    def moved(picture: Tensor, reach: int) -> Tensor:
        return shifted(picture[None], draw(-reach, reach), draw(-reach, reach))[0]

    shapes = [rgba, moved(rgba, 2), moved(smaller(rgba, draw(50, 60)), 3), rgba]
    colours = [0, 0, 0, draw(1, len(COLOURS) - 1)]
    palette = torch.tensor(list(COLOURS.values())) / 255
    return on_background(torch.stack(shapes), palette[colours]), colours


@torch.no_grad()
def normalise(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Give the latents zero mean and one spread a channel by folding the change into the 1x1 convolutions."""
    channels, target = mean.shape[0], 1 / SCALING_FACTOR
    gain = target / std
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] *= gain[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) * gain
    quant.bias[channels:] += 2 * gain.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight /= gain[None, :, None, None]
    vae.register_to_config(scaling_factor=SCALING_FACTOR)


def source_vae(arguments: argparse.Namespace) -> AutoencoderKL:
    """The autoencoder that encodes: the one just trained, or that of the pipeline to go on from."""
    folder = arguments.start / "vae" if arguments.start else arguments.work / "vae"
    return AutoencoderKL.from_pretrained(folder).eval()


@torch.no_grad()
def encode_part(arguments: argparse.Namespace, start: int) -> tuple[npt.NDArray[np.float32], list[list[int]]]:
    """Latents and background colours of the variants of `PART` icons (arrays travel between processes by value)."""
    torch.set_num_threads(1)
    icons = load_icons(arguments.icons)
    vae = source_vae(arguments)
    latents, colours = [], []
    for index in range(start, min(start + PART, len(icons.records))):
        pictures, shades = variants(icons.pixels[index], torch.Generator().manual_seed(arguments.seed + index))
        latents.append(vae.encode(pictures).latent_dist.mean.numpy())
        colours.append(shades)
    return np.stack(latents), colours


def encode_latents(arguments: argparse.Namespace) -> None:
    """Encode the variants of all icons, and write the autoencoder that gives normalised latents."""
    icons = load_icons(arguments.icons)
    starts = range(0, len(icons.records), PART)
    with ProcessPoolExecutor(arguments.workers, mp_context=mp.get_context("spawn")) as pool:
        parts = list(pool.map(encode_part, [arguments] * len(starts), starts))
    colours = [shades for _, part in parts for shades in part]
    stored = torch.from_numpy(np.concatenate([latents for latents, _ in parts]))
    vae = source_vae(arguments)
    if arguments.start:  # already normalised, and the U-Net to go on from knows these latents
        vae.save_pretrained(arguments.work / "vae-normalised")
        scaled = (stored * vae.config.scaling_factor).to(torch.bfloat16)
        save_file({"latents": scaled, "colours": torch.tensor(colours)}, arguments.work / "latents.safetensors")
        return
    share = icons.weights[:, None] * torch.tensor(VARIANT_WEIGHTS)
    share = (share / share.sum() / 64)[:, :, None, None, None]
    mean = (stored * share).sum((0, 1, 3, 4))
    std = ((stored - mean[:, None, None]).square() * share).sum((0, 1, 3, 4)).sqrt()
    normalise(vae, mean, std)
    vae.save_pretrained(arguments.work / "vae-normalised")
    whitened = ((stored - mean[:, None, None]) / std[:, None, None]).to(torch.bfloat16)
    save_file({"latents": whitened, "colours": torch.tensor(colours)}, arguments.work / "latents.safetensors")


# --- text and U-Net --------------------------------------------------------------------------------------------

TEXT_WIDTH = 128
TEXT_LENGTH = 40  # tokens while the text encoder learns words; all later positions then start as padding


def new_unet() -> UNet2DConditionModel:
    """Stable Diffusion 1.5's block structure; most of the width where the picture is laid out."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        block_out_channels=(160, 128, 96, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=32,
    )
    for name, parameter in unet.named_parameters():
        if name.endswith(("conv2.weight", "conv2.bias")) or name.startswith("conv_out") or ".proj_out." in name:
            nn.init.zeros_(parameter)
    return unet


def new_text_encoder(vocabulary: int) -> CLIPTextModel:
    """A small CLIP text encoder."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )
    config._attn_implementation = "eager"  # several times as fast backward in bfloat16 on a CPU
    return CLIPTextModel(config)


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule; the model predicts velocity."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


class SharedTextAttention:
    """Plain attention in which consecutive samples share one caption, projected once: (k * captions) queries."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend; the arguments are diffusers'."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        heads, width = attn.heads, attn.to_q.out_features
        query, key, value = (
            layer(states).view(context.shape[0], -1, heads, width // heads).transpose(1, 2)
            for layer, states in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        weights = torch.softmax((query * (width // heads) ** -0.5) @ key.transpose(-1, -2), dim=-1)
        mixed = (weights @ value).transpose(1, 2).reshape(hidden_states.shape[0], -1, width)
        out: Tensor = attn.to_out[0](mixed)
        return out


class Captions:
    """Draws prompts for icons and turns them into ids of the tokens that occur at all."""

    templates = ("a picture of {}", "an icon of {}", "a drawing of {}", "an emoji of {}", "{} emoji", "{} icon")

    def __init__(self, records: list[dict[str, Any]], tokenizer: CLIPTokenizer) -> None:
        self.records, self.tokenizer = records, tokenizer
        texts = {text for record in records for text in [*record["captions"], *record["tags"], record["style"]]}
        texts |= {template.format("a, an in on background") for template in self.templates} | set(COLOURS)
        used = {token for ids in tokenizer(sorted(texts)).input_ids for token in ids}
        self.used = sorted(used)
        self.compact = {token: index for index, token in enumerate(self.used)}

    def draw(self, record: dict[str, Any], colour: str, rng: random.Random) -> str:
        """One prompt for a picture of an icon on a colour; one in ten is empty, for guidance."""
        if rng.random() < 0.1:
            return ""
        name = self.name(record, rng)
        if colour != "white" or rng.random() < 0.08:
            name += f" on a {colour} background"
        if rng.random() < 0.1:
            return name
        return f"{name} in {record['style']}" if rng.random() < 0.1 else f"{name}, {record['style']}"

    def name(self, record: dict[str, Any], rng: random.Random) -> str:
        """What a prompt calls an icon."""
        kind, tags = rng.random(), record["tags"]
        if tags and kind < 0.04:
            return str(rng.choice(tags))
        name = str(record["captions"][0] if kind < 0.6 else rng.choice(record["captions"]))
        if kind > 0.93 and tags:
            return ", ".join([name, *rng.sample(tags, min(2, len(tags)))])
        article = "an" if name[0] in "aeiou" else "a"
        dressed = name if rng.random() < 0.7 else f"{article} {name}"
        return rng.choice(self.templates).format(dressed) if rng.random() < 0.07 else dressed

    def ids(self, prompts: list[str]) -> Tensor:
        """Compact ids, padded to the length that inference uses."""
        rows = self.tokenizer(prompts, padding="max_length", max_length=77, truncation=True).input_ids
        return torch.tensor([[self.compact[token] for token in row] for row in rows])


class TextAndUNet(nn.Module):
    """What is trained in the last stage."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.text_encoder = new_text_encoder(vocabulary)
        self.unet = new_unet()

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """Predict velocity."""
        velocity: Tensor = self.unet(noisy, timesteps, self.text_encoder(ids).last_hidden_state).sample
        return velocity


class TextMatcher(nn.Module):
    """A text encoder that is asked what the picture of a caption looks like, and which of a batch it is."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.text_encoder = new_text_encoder(vocabulary)
        self.look = nn.Linear(TEXT_WIDTH, 1024)
        self.text_side, self.picture_side = nn.Linear(TEXT_WIDTH, 96), nn.Linear(1024, 96)

    def forward(self, ids: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """The expected latents, and scaled similarities (captions by pictures)."""
        # The mean over all positions: the U-Net starts by attending to all alike, and padding is most of them.
        summary = self.text_encoder(ids).last_hidden_state.mean(1)
        ours = F.normalize(self.text_side(summary), dim=-1)
        theirs = F.normalize(self.picture_side(pictures), dim=-1)
        return self.look(summary), 12 * ours @ theirs.T


@dataclass
class TextJob:
    """Teach the text encoder words before the U-Net listens to it; from a random start it listens very late."""

    settings: argparse.Namespace

    def build(self) -> nn.Module:
        """A fresh text encoder with its heads."""
        captions = caption_source(self.settings)
        torch.manual_seed(self.settings.seed)
        return TextMatcher(len(captions.used))

    def prepare(self, module: nn.Module) -> Callable[[int, int], dict[str, float]]:
        """Load the latents; the function returned runs one micro-batch."""
        settings, draw = self.settings, Examples(self.settings)

        def run(step: int, index: int) -> dict[str, float]:
            latents, ids, records = draw.batch((settings.seed + 3) * 1_000_003 + step * 64 + index, settings.batch)
            flat = latents.flatten(1)
            look, similarity = module(ids[:, :TEXT_LENGTH], flat.to(torch.bfloat16))
            error = F.mse_loss(look.float(), flat)
            # Pictures of one icon are one target.
            same = torch.tensor(records)
            share = (same[:, None] == same[None]).float()
            named = ids[:, 1] != ids[:, -1]
            chosen = F.cross_entropy(similarity.float(), share / share.sum(1, keepdim=True), reduction="none")
            match = (chosen * named).sum() / named.sum().clamp(min=1)
            (error + 0.3 * match).backward()
            return {"error": float(error.detach()), "match": float(match.detach())}

        return run


def train_text(arguments: argparse.Namespace) -> None:
    """Train the text encoder alone and write `<work>/text.safetensors`, where the U-Net's stage begins."""

    def export(weights: dict[str, Tensor]) -> None:
        own = {key.split(".", 1)[1]: value for key, value in weights.items() if key.startswith("text_encoder.")}
        positions = next(value for key, value in own.items() if key.endswith("position_embedding.weight"))
        positions[TEXT_LENGTH:] = positions[TEXT_LENGTH - 1]  # all padding alike
        save_file(own, arguments.work / "text.tmp")
        os.replace(arguments.work / "text.tmp", arguments.work / "text.safetensors")

    Trainer(TextJob(arguments), arguments, ("error", "match")).run(export, export_every=100)


def caption_source(settings: argparse.Namespace) -> Captions:
    """The prompts of the icons."""
    return Captions(load_icons(settings.icons).records, CLIPTokenizer.from_pretrained(settings.tokenizer))


class Examples:
    """Draws latents with prompts."""

    def __init__(self, settings: argparse.Namespace) -> None:
        self.captions = caption_source(settings)
        data = load_file(settings.work / "latents.safetensors")
        self.latents, self.colours = data["latents"], data["colours"]
        self.chances = load_icons(settings.icons).weights
        self.variant_chances, self.palette = torch.tensor(VARIANT_WEIGHTS), list(COLOURS)

    def batch(self, seed: int, size: int) -> tuple[Tensor, Tensor, list[int]]:
        """Latents, compact ids and icon indices; also seeds torch's generator."""
        torch.manual_seed(seed)
        rng = random.Random(seed)
        picks = torch.multinomial(self.chances, size, replacement=True)
        shapes = torch.multinomial(self.variant_chances, size, replacement=True)
        shades = self.colours[picks, shapes].tolist()
        chosen = list(zip(picks.tolist(), shades, strict=True))
        prompts = [self.captions.draw(self.captions.records[i], self.palette[shade], rng) for i, shade in chosen]
        return self.latents[picks, shapes].float(), self.captions.ids(prompts), picks.tolist()


def load_pipeline(module: TextAndUNet, folder: Path, used: list[int]) -> None:
    """Begin with the weights of an exported pipeline."""
    module.unet.load_state_dict(UNet2DConditionModel.from_pretrained(folder / "unet").state_dict())
    weights = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).state_dict()
    name = next(key for key in weights if key.endswith("token_embedding.weight"))
    module.text_encoder.load_state_dict(weights | {name: weights[name][used]})


@dataclass
class UNetJob:
    """Train text encoder and U-Net on stored latents."""

    settings: argparse.Namespace

    def build(self) -> nn.Module:
        """Fresh U-Net, and the text encoder that has learned words where there is one."""
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
        """Load the latents; the function returned runs one micro-batch."""
        settings, draw = self.settings, Examples(self.settings)
        module.unet.set_attn_processor(SharedTextAttention())
        double_by_copies(module)
        signal = new_scheduler().alphas_cumprod
        forward = torch.compile(module) if settings.compile else module
        repeats = settings.repeats

        def run(step: int, index: int) -> dict[str, float]:
            size = settings.batch
            latents, ids, _ = draw.batch((settings.seed + 1) * 1_000_003 + step * 64 + index, size // repeats)
            clean = latents.repeat_interleave(repeats, 0)
            # Evenly spread over the noise levels, in random order: less noise in the gradient than free draws.
            timesteps = ((torch.randperm(size) + torch.rand(size)) * (1000 / size)).long().clamp(max=999)
            alpha = signal[timesteps][:, None, None, None]
            noise = torch.randn_like(clean)
            noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
            wanted = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
            found = forward(noisy.to(torch.bfloat16), timesteps, ids).float()
            errors = (found - wanted).square().mean((1, 2, 3))
            # Velocity's own weighting, held down where hardly any noise is left (as min-SNR does): what a caption
            # says is decided where noise is strong, and weights that vanish there leave captions unheard.
            total = 1 / (1 - alpha.flatten())
            loss = (errors * total.clamp(max=5) / total).mean()
            loss.backward()
            return {"loss": float(loss.detach()), "error": float(errors.detach().mean())}

        return run


def fill_vocabulary(weights: dict[str, Tensor], used: list[int], seed: int) -> dict[str, Tensor]:
    """The text encoder's weights with a row for every CLIP token; those never seen stay at a random start."""
    name = next(key for key in weights if key.endswith("token_embedding.weight"))
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(49408, TEXT_WIDTH, generator=generator) * 0.02
    table[used] = weights[name]
    return weights | {name: table}


def export_pipeline(weights: dict[str, Tensor], used: list[int], arguments: argparse.Namespace) -> None:
    """Write the averaged weights as a complete float16 Stable Diffusion directory."""
    parts: dict[str, dict[str, Tensor]] = {"text_encoder": {}, "unet": {}}
    for key, value in weights.items():
        part, name = key.split(".", 1)
        parts[part][name] = value
    text_encoder, unet = new_text_encoder(49408), new_unet()
    text_encoder.load_state_dict(fill_vocabulary(parts["text_encoder"], used, arguments.seed), strict=False)
    unet.load_state_dict(parts["unet"])
    vae_folder = "vae-final" if (arguments.work / "vae-final").exists() else "vae-normalised"
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(arguments.work / vae_folder).half(),
        text_encoder=text_encoder.half(),
        tokenizer=CLIPTokenizer.from_pretrained(arguments.tokenizer),
        unet=unet.half(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
    temporary = arguments.export.with_name(arguments.export.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.save_pretrained(temporary)
    # transformers loads in the type that the config names, diffusers in float32: let both compute in float32.
    config = temporary / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    replace_folder(temporary, arguments.export)


def train_unet(arguments: argparse.Namespace) -> None:
    """Train text encoder and U-Net, exporting a pipeline now and then."""
    job = UNetJob(arguments)
    used = caption_source(arguments).used
    trainer = Trainer(job, arguments, ("loss", "error"))
    trainer.run(lambda weights: export_pipeline(weights, used, arguments), arguments.export_every)


def export_checkpoint(arguments: argparse.Namespace) -> None:
    """Write the pipeline of the latest checkpoint, with the improved decoder where there is one."""
    flat = Flat(UNetJob(arguments).build())
    averaged = load_file(arguments.work / "unet-checkpoint" / "state.safetensors")["ema"]
    weights = {name: view.clone() for name, view in flat.views(averaged).items()}
    export_pipeline(weights, caption_source(arguments).used, arguments)


# --- samples ---------------------------------------------------------------------------------------------------

SAMPLE_CONCEPTS = ("red heart", "cat face", "alarm clock", "red apple", "house", "sun", "pizza", "dog face")
SAMPLE_STYLES = ("noto style", "twemoji style", "fluent flat style", "emojione style", "blob style")


def draw_samples(arguments: argparse.Namespace) -> None:
    """Draw a grid with the exported pipeline: concepts across, styles down."""
    pipeline = StableDiffusionPipeline.from_pretrained(arguments.model)
    pipeline.set_progress_bar_config(disable=True)
    concepts = arguments.concepts.split(",") if arguments.concepts else SAMPLE_CONCEPTS
    rows = arguments.styles.split(",") if arguments.styles else SAMPLE_STYLES
    sheet = Image.new("RGB", (66 * len(concepts) + 2, 66 * len(rows) + 2), "white")
    started = time.time()
    for row, style in enumerate(rows):
        generators = [torch.Generator().manual_seed(arguments.seed + column) for column in range(len(concepts))]
        prompts = [f"{concept}, {style}" if style else concept for concept in concepts]
        images = pipeline(
            prompts,
            num_inference_steps=arguments.steps,
            guidance_scale=arguments.guidance,
            generator=generators,
        ).images
        for column, image in enumerate(images):
            sheet.paste(image, (66 * column + 2, 66 * row + 2))
    print(f"{(time.time() - started) / len(rows) / len(concepts):.2f} s an image")
    sheet.resize((sheet.width * arguments.zoom, sheet.height * arguments.zoom), Image.Resampling.NEAREST).save(
        arguments.out
    )


def add_training_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """The options that every training stage has."""
    parser.add_argument("--steps", type=int, default=defaults["steps"], help="optimizer steps in all")
    parser.add_argument("--batch", type=int, default=defaults["batch"], help="pictures in a micro-batch")
    parser.add_argument("--micro", type=int, default=defaults["micro"], help="micro-batches in a step")
    parser.add_argument("--workers", type=int, default=2, help="processes, best one a core")
    parser.add_argument("--lr", type=float, default=defaults["lr"], help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=defaults["warmup"], help="steps of linear warmup")
    parser.add_argument("--ema", type=float, default=defaults["ema"], help="decay of the moving average")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--print-every", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile with torch.compile (needs a C++ compiler)")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    vae = stages.add_parser("vae", help="train the autoencoder")
    vae.add_argument("icons", type=Path, help="folder that prepare_icons.py wrote")
    vae.add_argument("work", type=Path, help="folder for checkpoints and results")
    add_training_options(vae, steps=1000, batch=16, micro=2, lr=1.2e-3, warmup=100, ema=0.995)
    vae.add_argument("--kl", type=float, default=5e-4, help="weight of the mean KL term")
    vae.set_defaults(run=train_vae)
    decoder = stages.add_parser("decoder", help="train the decoder further on the final latents")
    decoder.add_argument("icons", type=Path, help="folder that prepare_icons.py wrote")
    decoder.add_argument("work", type=Path, help="folder for checkpoints and results")
    add_training_options(decoder, steps=1000, batch=16, micro=2, lr=6e-4, warmup=20, ema=0.99)
    decoder.set_defaults(run=train_decoder)
    latents = stages.add_parser("latents", help="encode the icons with the trained autoencoder")
    latents.set_defaults(run=encode_latents)
    text = stages.add_parser("text", help="teach the text encoder words")
    add_training_options(text, steps=600, batch=128, micro=2, lr=1e-3, warmup=50, ema=0.99)
    text.set_defaults(run=train_text)
    unet = stages.add_parser("unet", help="train text encoder and U-Net")
    add_training_options(unet, steps=3000, batch=64, micro=2, lr=1e-3, warmup=100, ema=0.998)
    unet.add_argument("--export-every", type=int, default=500, help="steps between exports and checkpoints")
    unet.add_argument("--repeats", type=int, default=2, help="noise levels drawn for each picture of a micro-batch")
    unet.set_defaults(run=train_unet)
    export = stages.add_parser("export", help="write the pipeline once more, with the improved decoder")
    export.set_defaults(run=export_checkpoint, seed=0)
    for stage in (unet, export):
        stage.add_argument("--export", type=Path, required=True, help="where to write the pipeline")
    for stage in (latents, unet, export):
        stage.add_argument("--start", type=Path, help="go on from this exported pipeline")
    for stage in (text, unet, export):
        stage.add_argument("--tokenizer", type=Path, required=True, help="folder of the CLIP tokenizer")
    for stage in (latents, text, unet, export):
        stage.add_argument("icons", type=Path, help="folder that prepare_icons.py wrote")
        stage.add_argument("work", type=Path, help="folder for checkpoints and results")
    latents.add_argument("--seed", type=int, default=0)
    latents.add_argument("--workers", type=int, default=2, help="processes, best one a core")
    samples = stages.add_parser("samples", help="draw a grid of concepts in each style")
    samples.add_argument("model", type=Path)
    samples.add_argument("out", type=Path)
    samples.add_argument("--concepts", help="comma-separated; default: eight common ones")
    samples.add_argument("--styles", help="comma-separated; an empty one leaves the style out")
    samples.add_argument("--steps", type=int, default=20)
    samples.add_argument("--guidance", type=float, default=4.0)
    samples.add_argument("--zoom", type=int, default=2)
    samples.add_argument("--seed", type=int, default=0)
    samples.set_defaults(run=draw_samples)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run a stage."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    arguments.run(arguments)


if __name__ == "__main__":
    main()
