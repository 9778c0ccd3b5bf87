"""What a safetensors file contains, by the names of its tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias

from ...utils.errors import RestuneError
from .tensor_header import TensorHeader, read_tensor_header

Family: TypeAlias = Literal["sd1", "sd2", "sdxl"]
UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer.text_model."
OPEN_CLIP = "cond_stage_model.model."
CLIP_L = "conditioner.embedders.0.transformer.text_model."
CLIP_G = "conditioner.embedders.1.model."
REFINER = "conditioner.embedders.0.model."
SUPPORTED = "a Stable Diffusion 1.x, 2.x or XL checkpoint"

_TEXT_ENCODERS: dict[Family, tuple[str, ...]] = {"sd1": (CLIP,), "sd2": (OPEN_CLIP,), "sdxl": (CLIP_L, CLIP_G)}


def _named(*parts: str) -> Callable[[TensorHeader], bool]:
    return lambda header: any(part in name for name in header.shapes for part in parts)


def _starts(*prefixes: str) -> Callable[[TensorHeader], bool]:
    return lambda header: header.has(*prefixes)


# The order matters: an adapter's tensors carry the names of the model that it adapts.
_OTHERS: tuple[tuple[str, Callable[[TensorHeader], bool]], ...] = (
    ("a tuner file of restune-diffusion", lambda header: "restune.format_version" in header.metadata),
    ("a LoRA", _named(".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".lora.down.", "lora_linear_layer")),
    ("a LyCORIS file", _named(".hada_w1_", ".lokr_w", ".dora_scale")),
    ("a textual inversion embedding", _starts("emb_params", "string_to_param", "clip_l", "clip_g")),
    ("Flux", _named("double_blocks.", "single_transformer_blocks.")),
    ("Stable Diffusion 3", _named("joint_blocks.", "transformer_blocks.0.norm1_context.")),
    ("the refiner of Stable Diffusion XL", _starts(REFINER)),
    ("a ControlNet", _starts("control_model.", "controlnet_cond_embedding.", "input_hint_block.")),
    ("a motion module of AnimateDiff", _named("motion_modules.")),
    ("Playground v2.5, an EDM model", _starts("edm_mean")),
    ("Stable Cascade", _starts("clip_txt_mapper.", "down_blocks.1.0.channelwise.")),
    ("PixArt", _starts("caption_projection.", "y_embedder.")),
    ("a TAESD autoencoder", _starts("encoder.layers.", "decoder.layers.", "taesd_")),
    ("a VQ autoencoder", _starts("quantize.embedding.")),
)
_UNET_ALONE = "a U-Net alone in diffusers' format"
_PARTS: tuple[tuple[str, Callable[[TensorHeader], bool]], ...] = (
    (_UNET_ALONE, _starts("down_blocks.0.resnets.", "conv_in.")),
    ("a VAE", _starts("encoder.conv_in.", "decoder.conv_in.", VAE)),
    (
        "a text encoder",
        _starts("text_model.", "transformer.text_model.", "transformer.resblocks.", "cond_stage_model."),
    ),
)


def is_whole_checkpoint(header: TensorHeader) -> bool:
    """Return whether a file has a U-Net in the original LDM layout, with or without the other models."""
    return header.has(f"{UNET}input_blocks.") and not any(fits(header) for _, fits in _OTHERS)


def holds_unet(path: Path) -> bool:
    """Return whether a path is a checkpoint: a folder with a U-Net, or a file of one; no adapter of one."""
    if path.is_dir():
        return any(_is_unet_config(folder / "config.json") for folder in (path, path / "unet"))
    if path.suffix.lower() != ".safetensors" or not path.is_file():
        return False
    try:
        header = read_tensor_header(path)
    except RestuneError:
        return False
    return is_whole_checkpoint(header) or kind_of(header) == _UNET_ALONE


def _is_unet_config(file: Path) -> bool:
    try:
        return bool(json.loads(file.read_text(encoding="utf-8"))["_class_name"] == "UNet2DConditionModel")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def kind_of(header: TensorHeader) -> str:
    """Return what a safetensors file is, as a noun for messages."""
    for name, fits in _OTHERS:
        if fits(header):
            return name
    if header.has(f"{UNET}input_blocks."):
        return "a complete Stable Diffusion checkpoint"
    return next((name for name, fits in _PARTS if fits(header)), "not a model known here")


def check_is_vae(header: TensorHeader) -> None:
    """Raise `RestuneError` that names the content of a file, if it is not an autoencoder for images alone."""
    kind = kind_of(header)
    if kind == "a VAE":
        sides = {len(shape) for name, shape in header.shapes.items() if name.endswith("conv_in.weight")}
        if sides == {4}:
            return
        kind = "an autoencoder for video"
    raise RestuneError(f"The VAE {header.path} is {kind}; give an AutoencoderKL of Stable Diffusion.")


def family_of(header: TensorHeader, *, has_vae: bool = False) -> Family:
    """Return the model family of a single-file checkpoint in the original LDM layout.

    Args:
        header: header of the file.
        has_vae: whether another VAE replaces that of the file, which it may then lack.

    Raises:
        RestuneError: if the file is something else; the message names it.
    """
    if any(fits(header) for _, fits in _OTHERS) or not header.has(f"{UNET}input_blocks."):
        raise RestuneError(f"The base {header.path} is {kind_of(header)}; give {SUPPORTED}.")
    families: dict[Family, str] = {"sdxl": "conditioner.", "sd2": OPEN_CLIP, "sd1": "cond_stage_model."}
    family = next((family for family, prefix in families.items() if header.has(prefix)), None)
    if family is None:
        raise RestuneError(
            f"The base {header.path} holds a U-Net without its text encoder; give the complete checkpoint, or a "
            "folder in diffusers' format."
        )
    required = {"its VAE": VAE, **{f"the text encoder `{prefix[:-1]}`": prefix for prefix in _TEXT_ENCODERS[family]}}
    for what, prefix in required.items():
        if not header.has(prefix) and not (prefix == VAE and has_vae):
            other = ", or a VAE with --vae" if prefix == VAE else ""
            raise RestuneError(f"The base {header.path} lacks {what}; give the complete checkpoint{other}.")
    return family
