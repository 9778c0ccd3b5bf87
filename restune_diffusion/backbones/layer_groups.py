"""Groups of layers of a U-Net outside its transformer blocks, on which only LoRA acts.

| site | module | layers |
|---|---|---|
| `down.1.attn.0` | spatial transformer | `proj_in`, `proj_out` |
| `down.1.resnet.0` | residual block | `conv1`, `conv2`, `conv_shortcut`, `time_emb_proj` |
| `down.1.downsample`, `up.1.upsample` | sampler of a block | `conv` |
| `stem`, `head` | the U-Net | `conv_in`, `conv_out` |
| `time`, `added` | embeddings of the timestep and, of SDXL, of sizes and pooled text | `linear_1`, `linear_2` |

No forward pass reads a feature at these sites themselves; a tuner writes to their layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .description import Convolution, Site
from .site_names import Kind, SiteName
from .transformer_block import without_lora

_LAYERS: dict[str, tuple[str, ...]] = {
    "attn": ("proj_in", "proj_out"),
    "resnet": ("conv1", "time_emb_proj", "conv2", "conv_shortcut"),
    "sampler": ("conv",),
    "stem": ("conv_in",),
    "head": ("conv_out",),
    "embedding": ("linear_1", "linear_2"),
}
_EMBEDDINGS = {"time": "time_embedding", "added": "add_embedding"}
_SAMPLERS = {"downsample": "downsamplers", "upsample": "upsamplers"}


def embedding_groups(unet: Any) -> Iterator[tuple[str, Site]]:
    """Yield the groups before the first block: the embeddings and the first convolution."""
    for name, path in _EMBEDDINGS.items():
        yield from _group(name, "ends", "embedding", getattr(unet, path, None), 1)
    yield from _group("stem", "ends", "stem", unet, 1)


def head_group(unet: Any) -> Iterator[tuple[str, Site]]:
    """Yield the group of the last convolution."""
    yield from _group("head", "ends", "head", unet, 1)


def block_groups(stage: str, block: Any, stride: int) -> Iterator[tuple[str, Site]]:
    """Yield the groups of a block of a U-Net.

    Args:
        stage: name of the block, e.g. `down.1`.
        block: the block.
        stride: spatial downscaling of its features relative to the latent.
    """
    for number, resnet in enumerate(getattr(block, "resnets", None) or ()):
        yield from _group(f"{stage}.resnet.{number}", "conv", "resnet", resnet, stride)
    for number, attention in enumerate(getattr(block, "attentions", None) or ()):
        # The attention of a block without cross-attention is another module.
        if hasattr(attention, "transformer_blocks"):
            yield from _group(f"{stage}.attn.{number}", "proj", "attn", attention, stride)
    for name, path in _SAMPLERS.items():
        for sampler in (getattr(block, path, None) or ())[:1]:
            yield from _group(f"{stage}.{name}", "conv", "sampler", sampler, stride)


def group_path(name: SiteName) -> str:
    """Return the path in a `UNet2DConditionModel` of a group, or of one of its layers."""
    if name.operation == "ends":
        steps = [_EMBEDDINGS.get(name.family)]
    else:
        steps = ["mid_block" if name.family == "mid" else f"{name.family}_blocks.{name.index}"]
        if name.attention is not None:
            steps.append(f"attentions.{name.attention}")
        elif name.resnet is not None:
            steps.append(f"resnets.{name.resnet}")
        else:
            steps.append(f"{_SAMPLERS[str(name.sampler)]}.0")
    return ".".join(step for step in (*steps, name.linear) if step)


def _group(name: str, kind: Kind, layers: str, module: Any, stride: int) -> Iterator[tuple[str, Site]]:
    """Yield a group unless none of its layers exists."""
    linears: dict[str, tuple[int, int]] = {}
    convolutions: dict[str, Convolution] = {}
    for path in _LAYERS[layers]:
        child = getattr(module, path, None)
        layer = without_lora(child) if isinstance(child, nn.Module) else None
        if isinstance(layer, nn.Linear):
            linears[path] = layer.in_features, layer.out_features
        elif isinstance(layer, nn.Conv2d) and (shape := _shape(layer)) is not None:
            convolutions[path] = shape
    if linears or convolutions:
        first = next(iter([*convolutions.values(), *linears.values()]))
        yield name, Site(channels=first[0], stride=stride, operation=kind, linears=linears, convolutions=convolutions)


def _shape(layer: nn.Conv2d) -> Convolution | None:
    """Return the shape of a convolution; None if it is not square or has groups, dilation or another padding mode."""
    sizes = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    square = all(isinstance(size, tuple) and len(set(size)) == 1 for size in sizes)
    if not square or layer.dilation[0] != 1 or layer.groups != 1 or layer.padding_mode != "zeros":
        return None
    return Convolution(
        layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
    )
