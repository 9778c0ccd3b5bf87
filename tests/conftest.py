"""Small real models with Stable Diffusion's exact block structure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import nn

from restune_diffusion import BypassConfig, RestuneStableDiffusionPipeline, SkipConfig, Tuner, save_tuner

# Small models gain nothing from a second thread and slow down under load from other processes.
torch.set_num_threads(1)
# Nor do the processes that tests start: with two threads each they wait for each other's cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
TINY_BASE = ROOT / "restune_diffusion" / "assets" / "restune-tiny"

SD15_BLOCKS: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
}
SD15: dict[str, Any] = {
    **SD15_BLOCKS,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "sample_size": 64,
}
SDXL: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}


TWO_LEVELS: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
"""Smallest U-Net that has every kind of site."""


def make_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """Return a small frozen U-Net with SD 1.5's block structure and random weights."""
    config = {
        **SD15_BLOCKS,
        "block_out_channels": (32, 64, 64, 96),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        "sample_size": 16,
        **changes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel(**config).eval().requires_grad_(False)


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_inputs(batch: int = 2, size: int = 16, text_width: int = 32) -> Inputs:
    """Return random latents, a timestep and text embeddings."""
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, 4, size, size, generator=generator),
        torch.tensor(321),
        torch.randn(batch, 7, text_width, generator=generator),
    )


def randomize(module: nn.Module, seed: int = 0, std: float = 0.1) -> None:
    """Fill a tuner with random values, so that its residuals are nonzero as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return make_unet()


@pytest.fixture
def inputs() -> Inputs:
    return make_inputs()


@pytest.fixture(scope="session")
def components():
    return StableDiffusionPipeline.from_pretrained(str(TINY_BASE)).components


@pytest.fixture
def pipe(components):
    pipe = RestuneStableDiffusionPipeline(**components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    yield pipe
    pipe.unload_tuner_weights()
    pipe.unload_lora_weights()


@pytest.fixture(scope="session")
def files(components, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuners")
    for seed, (name, config) in enumerate(
        {"water": SkipConfig(ratio=0.5), "watercolor": BypassConfig(), "ink": SkipConfig(ratio=0.25)}.items()
    ):
        tuner = Tuner.for_base(components["unet"], config)
        randomize(tuner, seed, std=0.05)
        save_tuner(tuner, folder / f"{name}.safetensors")
    return folder
