"""Model configs in diffusers' format for a single-file checkpoint, derived from the shapes of its tensors.

Numbers that no shape tells are those of the published configs: number of attention heads (8 in SD 1.x, 64 channels a
head in SD 2.x and SDXL), noise schedule, scaling factor of the latents, and native resolution.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...utils.errors import RestuneError
from .contents import CLIP, CLIP_G, CLIP_L, OPEN_CLIP, UNET, VAE, Family
from .tensor_header import TensorHeader
from .vae_config import count_modules, ldm_structure

_SCALING = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
_PIXELS = {"sd1": 512, "sd2": 512, "sdxl": 1024}
_PIXELS_V2 = 768
_HEADS = 8
_HEAD_WIDTH = 64


@dataclass(frozen=True)
class ModelConfigs:
    """Configs of the models in a single-file checkpoint, by component name, and whether it is for inpainting."""

    family: Family
    models: Mapping[str, dict[str, Any]]

    @property
    def inpainting(self) -> bool:
        """Whether the U-Net takes a mask and a masked image."""
        latents = self.models["vae"]["latent_channels"]
        return bool(self.models["unet"]["in_channels"] == 2 * latents + 1)


def native_pixels(family: Family, *, v_prediction: bool) -> int:
    """Return the side of the images that a family is made for; SD 2.x with v-prediction has a larger one."""
    return _PIXELS_V2 if family == "sd2" and v_prediction else _PIXELS[family]


def model_configs(
    header: TensorHeader, family: Family, *, v_prediction: bool, vae: Mapping[str, Any] | None = None
) -> ModelConfigs:
    """Return the configs of the U-Net, the VAE and the text encoders.

    Args:
        header: header of the checkpoint.
        family: its model family.
        v_prediction: whether the base predicts velocity; SD 2.x with it is made for 768 pixels.
        vae: config of another VAE that replaces that of the checkpoint.

    Raises:
        RestuneError: if tensors are missing that tell the structure.
    """
    try:
        pixels = native_pixels(family, v_prediction=v_prediction)
        vae = own_vae_config(header, family, pixels) if vae is None else dict(vae)
        texts = _text_encoders(header, family)
        unet = _unet(header, family, pixels // 2 ** (len(vae["block_out_channels"]) - 1), texts)
    except (KeyError, IndexError, ValueError) as error:
        raise RestuneError(
            f"The base {header.path} is incomplete: its structure cannot be read, because {error} is missing; "
            "download the checkpoint again."
        ) from error
    return ModelConfigs(family, {"unet": unet, "vae": vae, **texts})


def _unet(header: TensorHeader, family: Family, side: int, texts: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    shapes = header.shapes
    levels: list[dict[str, int]] = [{}]
    context = 0
    linear = False
    for index in range(1, count_modules(header, f"{UNET}input_blocks.")):
        block = f"{UNET}input_blocks.{index}"
        if f"{block}.0.op.weight" in shapes:
            levels.append({})
            continue
        level = levels[-1]
        level["channels"] = shapes[f"{block}.0.out_layers.3.weight"][0]
        level["layers"] = level.get("layers", 0) + 1
        level["transformers"] = count_modules(header, f"{block}.1.transformer_blocks.")
        if level["transformers"]:
            context = shapes[f"{block}.1.transformer_blocks.0.attn2.to_k.weight"][1]
            linear = len(shapes[f"{block}.1.proj_in.weight"]) == 2
    channels = [level["channels"] for level in levels]
    depths = [max(1, level["transformers"]) for level in levels]
    # The middle block has its own depth in the file; diffusers takes that of the last level.
    depths[-1] = max(1, count_modules(header, f"{UNET}middle_block.1.transformer_blocks."))
    attends = [level["transformers"] > 0 for level in levels]
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": shapes[f"{UNET}input_blocks.0.0.weight"][1],
        "out_channels": shapes[f"{UNET}out.2.weight"][0],
        "sample_size": side,
        "block_out_channels": channels,
        "layers_per_block": levels[0]["layers"],
        "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)],
        "cross_attention_dim": context,
        "attention_head_dim": _HEADS if family == "sd1" else [max(1, width // _HEAD_WIDTH) for width in channels],
        "use_linear_projection": linear,
    }
    if max(depths) > 1:
        config["transformer_layers_per_block"] = depths
    if family == "sdxl":
        pooled = texts["text_encoder_2"]["projection_dim"]
        conditioning = shapes[f"{UNET}label_emb.0.0.weight"][1]
        config |= {
            "addition_embed_type": "text_time",
            "projection_class_embeddings_input_dim": conditioning,
            # The sizes are six numbers: original size, crop and target size, each of two sides.
            "addition_time_embed_dim": (conditioning - pooled) // 6,
        }
    return config


def own_vae_config(header: TensorHeader, family: Family, pixels: int) -> dict[str, Any]:
    """Return the config of the VAE in a checkpoint; without the structure, if the checkpoint has no VAE."""
    structure = ldm_structure(header, VAE) if header.has(VAE) else {}
    # SDXL's own autoencoder overflows in fp16 (the reason for madebyollin/sdxl-vae-fp16-fix).
    return {
        **structure,
        "sample_size": pixels,
        "scaling_factor": _SCALING[family],
        "force_upcast": family == "sdxl",
    }


def _text_encoders(header: TensorHeader, family: Family) -> dict[str, dict[str, Any]]:
    if family == "sd1":
        return {"text_encoder": _clip(header, CLIP)}
    if family == "sd2":
        # SD 2.x conditions on the states before the last layer; its repository in diffusers' format omits that layer.
        return {"text_encoder": _open_clip(header, OPEN_CLIP, "CLIPTextModel", omitted=1)}
    second = _open_clip(header, CLIP_G, "CLIPTextModelWithProjection")
    return {"text_encoder": _clip(header, CLIP_L), "text_encoder_2": second}


def _text_config(shape: Iterable[int], layers: int, inner: int, positions: int, **changes: Any) -> dict[str, Any]:
    vocabulary, width = shape
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // _HEAD_WIDTH),
        "max_position_embeddings": positions,
        "projection_dim": width,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "model_type": "clip_text_model",
        **changes,
    }


def _clip(header: TensorHeader, prefix: str) -> dict[str, Any]:
    shapes = header.shapes
    return _text_config(
        shapes[f"{prefix}embeddings.token_embedding.weight"],
        count_modules(header, f"{prefix}encoder.layers."),
        shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"][0],
        shapes[f"{prefix}embeddings.position_embedding.weight"][0],
        architectures=["CLIPTextModel"],
        hidden_act="quick_gelu",
    )


def _open_clip(header: TensorHeader, prefix: str, model: str, *, omitted: int = 0) -> dict[str, Any]:
    shapes = header.shapes
    config = _text_config(
        shapes[f"{prefix}token_embedding.weight"],
        count_modules(header, f"{prefix}transformer.resblocks.") - omitted,
        shapes[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"][0],
        shapes[f"{prefix}positional_embedding"][0],
        architectures=[model],
        hidden_act="gelu",
    )
    if f"{prefix}text_projection" in shapes:
        config["projection_dim"] = shapes[f"{prefix}text_projection"][1]
    return config
