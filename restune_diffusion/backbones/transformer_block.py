"""Sites inside diffusers' `BasicTransformerBlock`, which U-Nets and diffusion transformers have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..utils.errors import RestuneError
from .description import Site
from .site_names import Kind, SiteName

PATH_OF_OPERATION: dict[Kind, str] = {"self": "attn1", "cross": "attn2", "ff": "ff", "block": ""}


def block_sites(name: str, block: Any, stride: int) -> Iterator[tuple[str, Site]]:
    """Yield the sites of a block's operations.

    Args:
        name: name of the block's sites.
        block: a `BasicTransformerBlock`.
        stride: spatial downscale of its tokens against the latent.
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
    """Return the path of what runs at a site inside a transformer block.

    Args:
        block: path of the transformer block.
        name: the site.
        path_of: path in the block of each operation.

    Raises:
        RestuneError: if the site is not that of an operation.
    """
    if name.operation is None or name.operation not in path_of:
        raise RestuneError(f"`{name}` is not an operation of this base; its operations are {', '.join(path_of)}.")
    return ".".join(step for step in (block, path_of[name.operation], name.linear) if step)


def linear_layers(module: nn.Module, path: str = "") -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield path and widths of the base's linear layers below a module."""
    layer = without_lora(module)
    if isinstance(layer, nn.Linear):
        yield path, (layer.in_features, layer.out_features)
        return
    for name, child in module.named_children():
        # An attention's processor is no part of the base; that of an IP-Adapter has layers.
        if name != "processor":
            yield from linear_layers(child, f"{path}.{name}" if path else name)


def without_lora(module: nn.Module) -> nn.Module:
    """Return the layer that PEFT wraps while a LoRA is loaded: it is there with and without."""
    layer = getattr(module, "base_layer", module)
    assert isinstance(layer, nn.Module)
    return layer
