"""Export of the trained weights as a Stable Diffusion pipeline, and loading of an exported pipeline."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from research.restune_tiny.parts.folders import decoder_folder, replace_folder
from research.restune_tiny.parts.networks import TEXT_WIDTH, TextAndUNet, new_scheduler, new_text_encoder, new_unet


def load_pipeline(module: TextAndUNet, folder: Path, used: list[int]) -> None:
    """Load the weights of an exported pipeline."""
    module.unet.load_state_dict(UNet2DConditionModel.from_pretrained(folder / "unet").state_dict())
    weights = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).state_dict()
    name = next(key for key in weights if key.endswith("token_embedding.weight"))
    module.text_encoder.load_state_dict(weights | {name: weights[name][used]})


def fill_vocabulary(weights: dict[str, Tensor], used: list[int], seed: int) -> dict[str, Tensor]:
    """Return the text encoder's weights with an embedding for every CLIP token; unused tokens get random ones."""
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
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(decoder_folder(arguments.work)).half(),
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
    # transformers loads in the dtype of the config and diffusers in float32: set the config to float32 for both.
    config = temporary / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    write_for_transformers_4(temporary)
    replace_folder(temporary, arguments.export)


def write_for_transformers_4(folder: Path) -> None:
    """Add what transformers 4 reads and version 5 leaves out: prefixed keys of the text encoder, vocabulary, merges.

    Version 4 fills a CLIP text encoder at random, with a warning, if its keys lack `text_model.`.
    """
    file = folder / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    tokenizer = folder / "tokenizer"
    model = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    (tokenizer / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (tokenizer / "merges.txt").write_text("\n".join(lines) + "\n")


def blend_pipelines(arguments: argparse.Namespace) -> None:
    """Write a pipeline with the weighted average of two U-Nets and text encoders (arXiv 2203.05482)."""
    temporary = arguments.out.with_name(arguments.out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(arguments.first, temporary)
    for name in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        first, second = load_file(arguments.first / name), load_file(arguments.second / name)
        mixed = {
            key: value.float().lerp(second[key].float(), arguments.share).to(value.dtype)
            for key, value in first.items()
        }
        save_file(mixed, temporary / name, metadata={"format": "pt"})
    replace_folder(temporary, arguments.out)
