"""Sites inside diffusers' `BasicTransformerBlock`, used by U-Nets and diffusion transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..utils.errors import RestuneError
from .description import Site
from .site_names import Kind, SiteName

PATH_OF_OPERATION: dict[Kind, str] = {"self": "attn1", "cross": "attn2", "ff": "ff", "block": ""}
# Layers that `fuse_qkv_projections` of diffusers adds, with the projections that they replace.
# `unfuse_qkv_projections` keeps them.
_FUSED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v")}


def block_sites(name: str, block: Any, stride: int) -> Iterator[tuple[str, Site]]:
    """Yield the sites of a block's operations.

    Args:
        name: prefix of the site names.
        block: a `BasicTransformerBlock`.
        stride: spatial downscaling of its tokens relative to the latent.
    """
    channels, heads = block.attn1.to_q.in_features, block.attn1.heads
    for operation, path in PATH_OF_OPERATION.items():
        if getattr(block, path or "attn1", None) is None:
            continue
        module = block.get_submodule(path)
        yield (
            f"{name}.{operation}",
            Site(
                channels=channels,
                stride=stride,
                operation=operation,
                heads=getattr(module, "heads", heads),
                linears={} if operation == "block" else dict(linear_layers(module)),
            ),
        )


def inside(block: str, name: SiteName, path_of: Mapping[Kind, str]) -> str:
    """Return the path of the module at a site inside a transformer block.

    Args:
        block: path of the transformer block.
        name: name of the site.
        path_of: path of each operation relative to the block.

    Raises:
        RestuneError: if the site has no operation of this base.
    """
    if name.operation is None or name.operation not in path_of:
        raise RestuneError(f"`{name}` is not an operation of this base; its operations are {', '.join(path_of)}.")
    return ".".join(step for step in (block, path_of[name.operation], name.linear) if step)


def linear_layers(module: nn.Module, path: str = "") -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield path, input and output width of the base's linear layers in a module."""
    layer = without_lora(module)
    if isinstance(layer, nn.Linear):
        yield path, (layer.in_features, layer.out_features)
        return
    for name, child in module.named_children():
        # Attention processors, of which those of an IP-Adapter have linear layers, and fused copies of projections are
        # not part of the base.
        if name != "processor" and name not in _FUSED:
            yield from linear_layers(child, f"{path}.{name}" if path else name)


def has_fused(attention: Any) -> bool:
    """Return whether an attention module computes any projection in a fused layer."""
    # Only diffusers' attention modules have a processor.
    return type(getattr(attention, "processor", None)).__name__.startswith("Fused")


def is_fused(attention: Any, projection: str) -> bool:
    """Return whether an attention module computes a projection, for example `to_q`, in a fused layer."""
    return has_fused(attention) and any(
        projection in projections for layer, projections in _FUSED.items() if hasattr(attention, layer)
    )


def without_lora(module: nn.Module) -> nn.Module:
    """Return the base's layer inside a PEFT LoRA layer, or the module itself if it is not wrapped."""
    layer = getattr(module, "base_layer", module)
    assert isinstance(layer, nn.Module)
    return layer
