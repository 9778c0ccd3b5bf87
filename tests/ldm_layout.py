"""Write a diffusers pipeline as one file in the original LDM layout, as sd-scripts, ComfyUI and A1111 keep it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

_RES = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_EDGES = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
_CLIP_TO_OPEN = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def _renamed(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        if name.startswith(old + "."):
            return new + name[len(old) :]
    return name


def _inside(kind: str, rest: str) -> str:
    return f"0.{_renamed(rest, _RES)}" if kind == "resnets" else f"1.{rest}"


def unet_tensors(unet: Any) -> dict[str, Tensor]:
    """The U-Net's tensors under LDM's names."""
    layers = unet.config.layers_per_block
    result = {}
    for name, value in unet.state_dict().items():
        parts = name.split(".")
        if parts[0] == "down_blocks":
            level, kind, index = int(parts[1]), parts[2], int(parts[3])
            block = 1 + level * (layers + 1) + (layers if kind == "downsamplers" else index)
            rest = ".".join(parts[4:])
            if kind == "downsamplers":
                new = f"input_blocks.{block}.0.op.{parts[-1]}"
            else:
                new = f"input_blocks.{block}.{_inside(kind, rest)}"
        elif parts[0] == "up_blocks":
            level, kind, index = int(parts[1]), parts[2], int(parts[3])
            block = level * (layers + 1) + (layers if kind == "upsamplers" else index)
            rest = ".".join(parts[4:])
            if kind == "upsamplers":
                attends = hasattr(unet.up_blocks[level], "attentions")
                new = f"output_blocks.{block}.{1 + attends}.{rest}"
            else:
                new = f"output_blocks.{block}.{_inside(kind, rest)}"
        elif parts[0] == "mid_block":
            place = 1 if parts[1] == "attentions" else 2 * int(parts[2])
            rest = ".".join(parts[3:])
            new = f"middle_block.{place}.{_renamed(rest, _RES) if parts[1] == 'resnets' else rest}"
        else:
            new = _renamed(name, _EDGES)
        result[f"model.diffusion_model.{new}"] = value
    assert len(result) == len(unet.state_dict())
    return result


def vae_tensors(vae: Any) -> dict[str, Tensor]:
    """The autoencoder's tensors under LDM's names."""
    levels = len(vae.config.block_out_channels)
    result = {}
    for name, value in vae.state_dict().items():
        new = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        parts = new.split(".")
        if parts[1] in ("down_blocks", "up_blocks"):
            down = parts[1] == "down_blocks"
            level = int(parts[2]) if down else levels - 1 - int(parts[2])
            side = "down" if down else "up"
            tail = f"block.{'.'.join(parts[4:])}" if parts[3] == "resnets" else f"{side}sample.{'.'.join(parts[5:])}"
            new = f"{parts[0]}.{side}.{level}.{tail}"
        elif parts[1] == "mid_block" and parts[2] == "resnets":
            new = f"{parts[0]}.mid.block_{int(parts[3]) + 1}.{'.'.join(parts[4:])}"
        elif parts[1] == "mid_block":
            names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
            new = f"{parts[0]}.mid.attn_1.{_renamed('.'.join(parts[4:]), names)}"
            if value.ndim == 2:
                value = value[:, :, None, None]
        result[f"first_stage_model.{new}"] = value
    return result


def _text_tensors(encoder: Any) -> dict[str, Tensor]:
    return {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}


def clip_tensors(encoder: Any, prefix: str) -> dict[str, Tensor]:
    """A CLIP text encoder's tensors under the names of transformers' wrapped model."""
    return {f"{prefix}.transformer.text_model.{name}": value for name, value in _text_tensors(encoder).items()}


def open_clip_tensors(encoder: Any, prefix: str, *, more_layers: int = 0) -> dict[str, Tensor]:
    """A text encoder's tensors under OpenCLIP's names; `more_layers` last layers are made up of zeros."""
    result, waiting = {}, {}
    for name, value in _text_tensors(encoder).items():
        parts = name.split(".")
        if parts[:2] == ["encoder", "layers"]:
            rest, layer = ".".join(parts[3:]), f"transformer.resblocks.{parts[2]}"
            if ".".join(parts[3:5]) in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                waiting[layer, parts[4][0], parts[5]] = value
            else:
                result[f"{layer}.{_renamed(rest, _CLIP_TO_OPEN)}"] = value
        elif name == "text_projection.weight":
            result["text_projection"] = value.T.contiguous()
        else:
            table = {
                "embeddings.token_embedding.weight": "token_embedding.weight",
                "embeddings.position_embedding.weight": "positional_embedding",
                "final_layer_norm.weight": "ln_final.weight",
                "final_layer_norm.bias": "ln_final.bias",
            }
            if name in table:
                result[table[name]] = value
    for layer, _, kind in waiting:
        joined = torch.cat([waiting[layer, which, kind] for which in "qkv"])
        result[f"{layer}.attn.in_proj_{kind}"] = joined
    layers = encoder.config.num_hidden_layers
    for extra in range(layers, layers + more_layers):
        for name in [name for name in result if name.startswith("transformer.resblocks.0.")]:
            result[name.replace(".0.", f".{extra}.", 1)] = torch.zeros_like(result[name])
    width = encoder.config.hidden_size
    result.setdefault("text_projection", torch.eye(width))
    return {f"{prefix}.model.{name}": value for name, value in result.items()}


def write_single_file(
    path: Path, family: str, parts: dict[str, Any], marks: Iterable[str] = (), metadata: dict[str, str] | None = None
) -> Path:
    """Write the models of a pipeline as one file; `marks` are empty tensors such as `v_pred`."""
    tensors = unet_tensors(parts["unet"]) | vae_tensors(parts["vae"])
    if family == "sd1":
        tensors |= clip_tensors(parts["text_encoder"], "cond_stage_model")
    elif family == "sd2":
        tensors |= open_clip_tensors(parts["text_encoder"], "cond_stage_model", more_layers=1)
    else:
        tensors |= clip_tensors(parts["text_encoder"], "conditioner.embedders.0")
        tensors |= open_clip_tensors(parts["text_encoder_2"], "conditioner.embedders.1")
    tensors |= {name: torch.zeros(0) for name in marks}
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path, metadata)
    return path
