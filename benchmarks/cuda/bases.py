"""Bases with random weights: the structures of SD 1.5 and SDXL, and small ones for a dry run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from benchmarks.preset_memory import BASES

ASSETS = Path(__file__).parents[2] / "restune_diffusion" / "assets"
_TINY = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
_TINY_XL = {
    **_TINY,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "cross_attention_dim": 32,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
}


@dataclass(frozen=True)
class Base:
    """Structure of a base; its text encoders have two layers, because the U-Net sees only their width."""

    name: str
    structure: Mapping[str, Any]
    pixels: int
    text_widths: tuple[int, ...]
    vae_widths: tuple[int, ...] = (128, 256, 512, 512)

    @property
    def is_xl(self) -> bool:
        """Whether the base is an SDXL."""
        return len(self.text_widths) > 1

    @property
    def latent(self) -> int:
        """Side of the latents."""
        return self.pixels // 8

    @property
    def small_latent(self) -> int:
        """Side of latents for comparisons with the CPU."""
        return max(self.latent // 2, 8) if not self.is_xl else max(self.latent // 4, 8)


FULL = (
    Base("SD 1.5", {**BASES["SD 1.5"][0]}, 512, (768,)),
    Base("SDXL", {**BASES["SDXL"][0], "sample_size": 128}, 1024, (768, 1280)),
)
TINY = (
    Base("SD 1.5, tiny", {**_TINY, "sample_size": 8}, 64, (16,), (4, 4, 4, 4)),
    Base("SDXL, tiny", {**_TINY_XL, "sample_size": 8}, 64, (16, 16), (4, 4, 4, 4)),
)


def build_unet(base: Base, device: torch.device) -> Any:
    """Return a frozen U-Net in fp32 with torch's default initialization, always the same."""
    torch.manual_seed(0)
    with device:
        return UNet2DConditionModel(**base.structure).eval().requires_grad_(False)


def twin(unet: Any) -> Any:
    """Return a U-Net with modules of its own that shares the weights."""
    with torch.device("meta"):
        other = UNet2DConditionModel.from_config(unet.config)
    other.load_state_dict(unet.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


def build_pipeline(base: Base, unet: Any) -> Any:
    """Return a pipeline around a U-Net, on its device and in its dtype."""
    torch.manual_seed(1)
    folder = ASSETS / "restune-tiny"
    tokenizer = _tokenizer()
    with unet.device:
        encoders = [
            (CLIPTextModelWithProjection if number else CLIPTextModel)(_text_config(width, tokenizer)).eval()
            for number, width in enumerate(base.text_widths)
        ]
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(base.vae_widths),
            up_block_types=("UpDecoderBlock2D",) * len(base.vae_widths),
            block_out_channels=base.vae_widths,
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=min(32, *base.vae_widths),
            sample_size=base.pixels,
        ).eval()
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler", prediction_type="epsilon")
    parts: dict[str, Any] = {"vae": vae, "tokenizer": tokenizer, "scheduler": scheduler, "text_encoder": encoders[0]}
    if base.is_xl:
        parts |= {"tokenizer_2": tokenizer, "text_encoder_2": encoders[1]}
    for model in (vae, *encoders):
        model.to(unet.dtype).requires_grad_(False)
    return wrap(base, {**parts, "unet": unet})


def wrap(base: Base, parts: dict[str, Any]) -> Any:
    """Return a pipeline of the components of another one, some of them replaced."""
    if base.is_xl:
        made: Any = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        parts = {"safety_checker": None, "feature_extractor": None, **parts}
        made = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


@cache
def _tokenizer() -> Any:
    return CLIPTokenizer.from_pretrained(ASSETS / "restune-tiny" / "tokenizer")


def _text_config(width: int, tokenizer: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2, num_attention_heads=max(width // 64, 2),
        projection_dim=width, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
