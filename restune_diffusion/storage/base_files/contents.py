"""What a safetensors file contains, by the names of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

from ...utils.errors import RestuneError
from .tensor_header import TensorHeader

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
)
_PARTS: tuple[tuple[str, Callable[[TensorHeader], bool]], ...] = (
    ("a U-Net alone in diffusers' format", _starts("down_blocks.0.resnets.", "conv_in.")),
    ("a VAE", _starts("encoder.conv_in.", "decoder.conv_in.", VAE)),
    (
        "a text encoder",
        _starts("text_model.", "transformer.text_model.", "transformer.resblocks.", "cond_stage_model."),
    ),
)


def family_of(header: TensorHeader) -> Family:
    """Return the model family of a single-file checkpoint in the original LDM layout.

    Raises:
        RestuneError: if the file is something else; the message names it.
    """
    for name, fits in _OTHERS:
        if fits(header):
            raise RestuneError(f"The base {header.path} is {name}; give {SUPPORTED}.")
    if not header.has(f"{UNET}input_blocks."):
        name = next((name for name, fits in _PARTS if fits(header)), "not a model known here")
        raise RestuneError(f"The base {header.path} is {name}; give {SUPPORTED}.")
    families: dict[Family, str] = {"sdxl": "conditioner.", "sd2": OPEN_CLIP, "sd1": "cond_stage_model."}
    family = next((family for family, prefix in families.items() if header.has(prefix)), None)
    if family is None:
        raise RestuneError(
            f"The base {header.path} holds a U-Net without its text encoder; give the complete checkpoint, or a "
            "folder in diffusers' format."
        )
    required = {"its VAE": VAE, **{f"the text encoder `{prefix[:-1]}`": prefix for prefix in _TEXT_ENCODERS[family]}}
    for what, prefix in required.items():
        if not header.has(prefix):
            raise RestuneError(f"The base {header.path} lacks {what}; give the complete checkpoint.")
    return family
