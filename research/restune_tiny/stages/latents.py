"""Stage that encodes all icons once, so that later stages need no VAE encoder."""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
import torch.multiprocessing as mp
from diffusers import AutoencoderKL
from torch import Tensor

from research.restune_tiny.parts.folders import write_tensors
from research.restune_tiny.parts.icons import VARIANT_WEIGHTS, load_icons
from research.restune_tiny.stages.autoencoder import normalise

PART = 400


def source_vae(arguments: argparse.Namespace) -> AutoencoderKL:
    """Return the VAE for encoding: that of the start pipeline, or the newly trained one."""
    folder = arguments.start / "vae" if arguments.start else arguments.work / "vae"
    return AutoencoderKL.from_pretrained(folder).eval()


@torch.no_grad()
def encode_part(arguments: argparse.Namespace, start: int) -> tuple[npt.NDArray[np.float32], list[list[int]]]:
    """Return latents and background colors of the variants of `PART` icons, as arrays that can be pickled."""
    torch.set_num_threads(1)
    icons = load_icons(arguments.icons)
    vae = source_vae(arguments)
    latents, colours = [], []
    for index in range(start, min(start + PART, len(icons.records))):
        images, shades = icons.variants(index, arguments.seed)
        latents.append(vae.encode(images).latent_dist.mean.numpy())
        colours.append(shades)
    return np.stack(latents), colours


def encode_latents(arguments: argparse.Namespace) -> None:
    """Encode the variants of all icons, and write the VAE with normalized latents."""
    icons = load_icons(arguments.icons)
    starts = range(0, len(icons.records), PART)
    with ProcessPoolExecutor(arguments.workers, mp_context=mp.get_context("spawn")) as pool:
        parts = list(pool.map(encode_part, [arguments] * len(starts), starts))
    colours = [shades for _, part in parts for shades in part]
    stored = torch.from_numpy(np.concatenate([latents for latents, _ in parts])).contiguous()
    vae = source_vae(arguments)
    if arguments.start:  # already normalized, and the start U-Net is trained on these latents
        vae.save_pretrained(arguments.work / "vae-normalised")
        scaled = (stored * vae.config.scaling_factor).to(torch.bfloat16)
        write_latents(scaled, colours, arguments)
        return
    share = icons.weights[:, None] * torch.tensor(VARIANT_WEIGHTS)
    share = (share / share.sum() / 64)[:, :, None, None, None]
    mean = (stored * share).sum((0, 1, 3, 4))
    std = ((stored - mean[:, None, None]).square() * share).sum((0, 1, 3, 4)).sqrt()
    normalise(vae, mean, std)
    vae.save_pretrained(arguments.work / "vae-normalised")
    whitened = ((stored - mean[:, None, None]) / std[:, None, None]).to(torch.bfloat16)
    write_latents(whitened, colours, arguments)


def write_latents(latents: Tensor, colours: list[list[int]], arguments: argparse.Namespace) -> None:
    """Write latents and background colors, with the seed for `Icons.variants` to reproduce the images."""
    stored = {"latents": latents, "colours": torch.tensor(colours), "seed": torch.tensor(arguments.seed)}
    write_tensors(stored, arguments.work / "latents.safetensors")
