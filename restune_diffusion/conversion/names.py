"""Translate between sites and the module names of other programs."""

from __future__ import annotations

import re

from ..backbones import BaseInfo, module_path
from ..utils.errors import BaseMismatchError

_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.(.+)")


def linear_shapes(base: BaseInfo) -> dict[str, tuple[int, int]]:
    """Return input and output width of every linear layer of the transformer blocks, by site."""
    return {
        f"{name}.{path}": shape
        for name, site in base.sites.items()
        if site.operation is not None
        for path, shape in site.linears.items()
    }


def sgm_path(path: str, layers_per_block: int) -> str:
    """Translate a module path of diffusers' U-Net to the original U-Net, as trainers of Stable Diffusion XL use it.

    Args:
        path: path of a module in a transformer, e.g. `down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2`.
        layers_per_block: value of the U-Net's config.
    """
    match = _BLOCK.fullmatch(path)
    if match is None:
        return path.replace("mid_block.attentions.0.", "middle_block.1.")
    stage, block, attention, rest = match.groups()
    number = int(block) * (layers_per_block + 1) + int(attention)
    # The original's first input block is `conv_in`.
    return f"input_blocks.{number + 1}.1.{rest}" if stage == "down" else f"output_blocks.{number}.1.{rest}"


def layers_per_block(base: BaseInfo) -> list[int]:
    """Return the number of residual blocks of each level of the encoder.

    Raises:
        BaseMismatchError: if the base's description lacks the number.
    """
    layers, levels = base.structure.get("layers_per_block"), base.structure.get("up_block_types")
    if isinstance(levels, list):
        if isinstance(layers, int):
            return [layers] * len(levels)
        if isinstance(layers, list) and len(layers) == len(levels) and all(isinstance(n, int) for n in layers):
            return layers
    raise BaseMismatchError(f"The base's structure has layers_per_block = {layers!r}, which is not supported.")


def skip_readers(base: BaseInfo) -> dict[str, str]:
    """Return the residual block of diffusers' decoder that reads each skip connection, by site, deep to shallow.

    Raises:
        BaseMismatchError: if the base's decoder is not supported.
    """
    skips = base.skips
    counts = [layers + 1 for layers in reversed(layers_per_block(base))]
    readers = [f"up_blocks.{block}.resnets.{layer}" for block, count in enumerate(counts) for layer in range(count)]
    if len(readers) != len(skips):
        raise BaseMismatchError(f"The base has {len(skips)} skip connections but its decoder reads {len(readers)}.")
    return dict(zip(reversed(skips), readers, strict=True))


def linear_paths(base: BaseInfo) -> dict[str, str]:
    """Return the site of every linear layer of the transformer blocks, by path in diffusers' U-Net."""
    return {module_path(site): site for site in linear_shapes(base)}


# sd-scripts numbers the two encoders of SDXL.
_TEXT_PREFIXES = {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}


def text_shapes(base: BaseInfo) -> dict[str, tuple[int, int]]:
    """Return input and output width of every linear layer of the text encoders' transformer layers, by site."""
    return {
        f"{encoder}.layers.{layer}.{path}": shape
        for encoder, info in base.text.items()
        for layer in range(info.num_hidden_layers)
        for path, shape in info.linears.items()
    }


def text_path(site: str) -> str:
    """Return the path of a linear layer of a text encoder in a pipeline, as diffusers writes it."""
    encoder, _, path = site.partition(".")
    return f"{encoder}.text_model.encoder.{path}"


def is_xl(base: BaseInfo) -> bool:
    """Return whether a base is Stable Diffusion XL, whose first level has no attention, unlike 1.x and 2.x."""
    return base.structure.get("down_block_types", [None])[0] == "DownBlock2D"


def dotted_names(base: BaseInfo) -> dict[str, str]:
    """Return the site of every linear layer by its dotted names.

    The names are those of diffusers and of the original U-Net, without a prefix for the U-Net. Those of the text
    encoders start with their name in a pipeline.
    """
    paths = linear_paths(base)
    names = paths | {sgm_path(path, layers_per_block(base)[0]): site for path, site in paths.items()}
    texts = {text_path(site): site for site in text_shapes(base)}
    # Recent versions of transformers have no `text_model` in some classes.
    return names | texts | {path.replace(".text_model.", ".", 1): site for path, site in texts.items()}


def underscored_names(base: BaseInfo) -> dict[str, str]:
    """Return the site of every linear layer by its names with underscores, as sd-scripts and LyCORIS use them."""
    names: dict[str, str] = {}
    for path, site in dotted_names(base).items():
        encoder, _, inside = path.partition(".")
        if encoder not in _TEXT_PREFIXES:
            names |= {prefix + path.replace(".", "_"): site for prefix in ("lora_unet_", "lycoris_")}
        else:
            names |= {prefix + inside.replace(".", "_"): site for prefix in _TEXT_PREFIXES[encoder]}
    return names


def underscored_name(site: str, base: BaseInfo) -> str:
    """Return the name of a linear layer in files of sd-scripts; for SDXL those of the original U-Net."""
    if site.partition(".")[0] in _TEXT_PREFIXES:
        encoder, _, inside = text_path(site).partition(".")
        first, *others = _TEXT_PREFIXES[encoder]
        return (others[0] if others and is_xl(base) else first) + inside.replace(".", "_")
    path = module_path(site)
    return "lora_unet_" + (sgm_path(path, layers_per_block(base)[0]) if is_xl(base) else path).replace(".", "_")
