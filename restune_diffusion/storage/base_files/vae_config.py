"""Config of an autoencoder in diffusers' format, from the shapes of its tensors in either key layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...utils.errors import RestuneError
from .contents import VAE
from .tensor_header import TensorHeader

# Settings that no shape tells; a VAE in one file has those of the VAE that it replaces.
_INHERITED = (
    "norm_num_groups",
    "sample_size",
    "scaling_factor",
    "shift_factor",
    "latents_mean",
    "latents_std",
    "force_upcast",
)


def count_modules(header: TensorHeader, prefix: str) -> int:
    """Return the number of numbered modules below a prefix."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return 1 + max((int(found[1]) for name in header.shapes if (found := pattern.match(name))), default=-1)


def ldm_structure(header: TensorHeader, prefix: str) -> dict[str, Any]:
    """Return the structure of an autoencoder in the original LDM layout, whose keys start with a prefix."""
    levels = count_modules(header, f"{prefix}encoder.down.")
    channels = [header.shapes[f"{prefix}encoder.down.{level}.block.0.conv2.weight"][0] for level in range(levels)]
    attends = header.has(f"{prefix}encoder.mid.attn_1.")
    return _structure(header, prefix, channels, count_modules(header, f"{prefix}encoder.down.0.block."), attends)


def _diffusers_structure(header: TensorHeader) -> dict[str, Any]:
    levels = count_modules(header, "encoder.down_blocks.")
    channels = [header.shapes[f"encoder.down_blocks.{level}.resnets.0.conv2.weight"][0] for level in range(levels)]
    layers = count_modules(header, "encoder.down_blocks.0.resnets.")
    return _structure(header, "", channels, layers, header.has("encoder.mid_block.attentions."))


def _structure(header: TensorHeader, prefix: str, channels: list[int], layers: int, attends: bool) -> dict[str, Any]:
    shapes = header.shapes
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": shapes[f"{prefix}encoder.conv_in.weight"][1],
        "out_channels": shapes[f"{prefix}decoder.conv_out.weight"][0],
        "latent_channels": shapes[f"{prefix}decoder.conv_in.weight"][1],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "use_quant_conv": f"{prefix}quant_conv.weight" in shapes,
        "use_post_quant_conv": f"{prefix}post_quant_conv.weight" in shapes,
        "mid_block_add_attention": attends,
    }


def is_diffusers_layout(header: TensorHeader) -> bool:
    """Return whether the keys of an autoencoder are those of diffusers, and not of LDM."""
    return header.has("encoder.down_blocks.")


def vae_file_config(header: TensorHeader, replaced: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of an autoencoder in one file.

    Args:
        header: header of the file.
        replaced: config of the VAE that it replaces, for the settings that no shape tells, such as the scaling factor.

    Raises:
        RestuneError: if tensors are missing that tell the structure.
    """
    try:
        if is_diffusers_layout(header):
            structure = _diffusers_structure(header)
        else:
            structure = ldm_structure(header, VAE if header.has(VAE) else "")
    except (KeyError, IndexError) as error:
        raise RestuneError(
            f"The VAE {header.path} is incomplete: {error} is missing; give a file with encoder and decoder."
        ) from error
    return {**structure, **{name: replaced[name] for name in _INHERITED if name in replaced}}
