"""Translate between sites and the module names of other programs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..backbones import BaseInfo, module_path
from ..backbones.description import Convolution
from ..utils.errors import BaseMismatchError

_BLOCK = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(attentions|resnets|(?:down|up)samplers)\.(\d+)\.(.+)")
# Layers of a residual block, and layers outside the blocks, in diffusers' and in the original U-Net.
_OF_RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
              "conv_shortcut": "skip_connection"}  # fmt: skip
_ENDS = {"conv_in": "input_blocks.0.0", "conv_out": "out.2",
         "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
         "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}  # fmt: skip


def unet_shapes(base: BaseInfo) -> dict[str, tuple[int, ...]]:
    """Return the shape of the weight of every layer that LoRA can act on in the U-Net, by site."""
    return {
        f"{name}.{path}": (shape[1], shape[0], *([shape.kernel] * 2 if isinstance(shape, Convolution) else []))
        for name, site in base.sites.items()
        if site.operation is not None
        for path, shape in site.layers.items()
    }


def weight_shapes(base: BaseInfo) -> dict[str, tuple[int, ...]]:
    """Return the shape of the weight of every layer that LoRA can act on, by site; text encoders included."""
    return unet_shapes(base) | text_shapes(base)


def sgm_path(path: str, layers_per_block: int, up_block_types: Sequence[str] = ()) -> str:
    """Translate a module path of diffusers' U-Net to the original U-Net, as trainers of Stable Diffusion XL use it.

    Args:
        path: path of a module, e.g. `down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2`.
        layers_per_block: value of the U-Net's config.
        up_block_types: value of the U-Net's config, on which the names of upsamplers depend.
    """
    match = _BLOCK.fullmatch(path)
    if match is None:
        return _ENDS.get(path, path)
    stage, block, kind, index, layer = match.groups()
    layer = _OF_RESNET.get(layer, layer)
    if stage is None:
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}.{layer}"
    first = int(block) * (layers_per_block + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers_per_block + 1}.0.op"
    if kind == "upsamplers":
        # It follows the attention of the block's last layer, if there is one.
        place = 2 if "Attn" in "".join(up_block_types[int(block) : int(block) + 1]) else 1
        return f"output_blocks.{first + layers_per_block}.{place}.{layer}"
    place, number = int(kind == "attentions"), first + int(index)
    # The original's first input block is `conv_in`.
    return (
        f"input_blocks.{number + 1}.{place}.{layer}" if stage == "down" else f"output_blocks.{number}.{place}.{layer}"
    )


def original_path(path: str, base: BaseInfo) -> str:
    """Translate a module path of diffusers' U-Net with the structure of a base; see `sgm_path`."""
    return sgm_path(path, layers_per_block(base)[0], base.structure["up_block_types"])


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


# sd-scripts numbers the two encoders of SDXL.
_TEXT_PREFIXES = {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}


def text_shapes(base: BaseInfo) -> dict[str, tuple[int, ...]]:
    """Return the shape of the weight of every linear layer of the text encoders' transformer layers, by site."""
    return {
        f"{encoder}.layers.{layer}.{path}": (outputs, inputs)
        for encoder, info in base.text.items()
        for layer in range(info.num_hidden_layers)
        for path, (inputs, outputs) in info.linears.items()
    }


def text_path(site: str) -> str:
    """Return the path of a linear layer of a text encoder in a pipeline, as diffusers writes it."""
    encoder, _, path = site.partition(".")
    return f"{encoder}.text_model.encoder.{path}"


def is_xl(base: BaseInfo) -> bool:
    """Return whether a base is Stable Diffusion XL, whose first level has no attention, unlike 1.x and 2.x."""
    return base.structure.get("down_block_types", [None])[0] == "DownBlock2D"


def dotted_names(base: BaseInfo) -> dict[str, str]:
    """Return the site of every layer by its dotted names.

    The names are those of diffusers and of the original U-Net, without a prefix for the U-Net. Those of the text
    encoders start with their name in a pipeline.
    """
    paths = {module_path(site): site for site in unet_shapes(base)}
    names = paths | {original_path(path, base): site for path, site in paths.items()}
    texts = {text_path(site): site for site in text_shapes(base)}
    # Recent versions of transformers have no `text_model` in some classes.
    return names | texts | {path.replace(".text_model.", ".", 1): site for path, site in texts.items()}


def underscored_names(base: BaseInfo) -> dict[str, str]:
    """Return the site of every layer by its names with underscores, as sd-scripts and LyCORIS use them."""
    names: dict[str, str] = {}
    for path, site in dotted_names(base).items():
        encoder, _, inside = path.partition(".")
        if encoder not in _TEXT_PREFIXES:
            names |= {prefix + path.replace(".", "_"): site for prefix in ("lora_unet_", "lycoris_")}
        else:
            names |= {prefix + inside.replace(".", "_"): site for prefix in _TEXT_PREFIXES[encoder]}
    return names


def underscored_name(site: str, base: BaseInfo) -> str:
    """Return the name of a layer in files of sd-scripts; for SDXL those of the original U-Net."""
    if site.partition(".")[0] in _TEXT_PREFIXES:
        encoder, _, inside = text_path(site).partition(".")
        first, *others = _TEXT_PREFIXES[encoder]
        return (others[0] if others and is_xl(base) else first) + inside.replace(".", "_")
    path = module_path(site)
    return "lora_unet_" + (original_path(path, base) if is_xl(base) else path).replace(".", "_")
