"""The U-Net of Stable Diffusion 1.x, 2.x and XL: `UNet2DConditionModel`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..utils.errors import RestuneError
from .description import BaseInfo, Site
from .forward_hooks import enter_head, tap_output
from .layer_groups import block_groups, embedding_groups, group_path, head_group
from .site_names import MID, OUT, SiteName
from .structure import Call, SiteHooks, Structure
from .transformer_block import PATH_OF_OPERATION, block_sites, inside


class UNetStructure(Structure):
    """Structure of a U-Net: skip connections, mid and up blocks, the output head, and transformer blocks."""

    class_name = "UNet2DConditionModel"
    # `in_channels` is omitted: an inpainting checkpoint has the same skip connections as the text-to-image checkpoint,
    # and takes the same tuners.
    keys = (
        "down_block_types",
        "mid_block_type",
        "up_block_types",
        "block_out_channels",
        "layers_per_block",
        "cross_attention_dim",
    )

    def sites(self, base: Any) -> Iterator[tuple[str, Site]]:
        """Yield the sites in the order of the forward pass."""
        return _unet_sites(base)

    def time_channels(self, base: Any) -> int:
        """Return the width of the time embedding."""
        return int(base.time_embedding.linear_2.out_features)

    def module_path(self, site: str) -> str:
        """Return the path of the module at a site, e.g. `mid.attn.0.block.0.self.to_q`."""
        return module_path(site)

    def install(self, base: Any, hooks: SiteHooks) -> list[RemovableHandle]:
        """Register hooks on the up blocks, which take the skip features, the mid block and the head."""
        counts = _skip_counts(base)
        stop = sum(counts)
        skips = tuple(_skip(number) for number in range(stop))
        handles = []
        for number, (block, count) in enumerate(zip(base.up_blocks, counts, strict=True)):
            enter = partial(_enter_up_block, hooks, skips[stop - count : stop])
            handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(block.register_forward_hook(partial(tap_output, hooks, _up(number))))
            stop -= count
        if getattr(base, "mid_block", None) is not None:
            handles.append(base.mid_block.register_forward_hook(partial(tap_output, hooks, MID)))
        handles.append(_head(base).register_forward_pre_hook(partial(enter_head, hooks)))
        return handles

    def run_head(self, base: Any, x: torch.Tensor) -> torch.Tensor:
        """Return the U-Net's prediction from the feature at the site `out`, `(batch, channels, height, width)`."""
        if base.conv_norm_out is not None:
            x = base.conv_act(base.conv_norm_out(x))
        predicted: torch.Tensor = base.conv_out(x)
        return predicted

    def call(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Return batch size, latent size and timestep from `sample` and `timestep`."""
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        return Call(sample.shape[0], (sample.shape[-2], sample.shape[-1]), sample.device, timestep)


def module_path(site: str) -> str:
    """Return the path in a `UNet2DConditionModel` of the module at a site of a transformer block or layer group.

    Args:
        site: name of an operation, e.g. `down.1.attn.0.block.0.ff`, or of a layer, e.g.
            `mid.attn.0.block.0.self.to_q` or `down.1.attn.0.proj_in`.

    Raises:
        RestuneError: if the site is between the blocks.
    """
    name = SiteName.parse(site)
    if name.operation in ("proj", "conv", "ends"):
        return group_path(name)
    if name.attention is None:
        raise RestuneError(f"`{site}` is not in a transformer block; expected for example `mid.attn.0.block.0.ff`.")
    parent = "mid_block" if name.family == MID else f"{name.family}_blocks.{name.index}"
    transformer = f"{parent}.attentions.{name.attention}.transformer_blocks.{name.block}"
    return inside(transformer, name, PATH_OF_OPERATION)


def late_skips(base: BaseInfo, depth: int) -> list[str]:
    """Return the skip connections of the last up blocks of a U-Net, from the shallowest.

    Args:
        base: structure of the U-Net.
        depth: number of up blocks, counted from the last.

    Raises:
        RestuneError: if the U-Net has fewer up blocks.
    """
    try:
        blocks = len(base.structure["up_block_types"])
        layers = base.structure["layers_per_block"]
        # An up block takes one skip feature more than the mirrored down block has layers; the last mirrors the first.
        counts = [count + 1 for count in (layers if isinstance(layers, list) else [layers] * blocks)]
    except (KeyError, TypeError) as error:
        raise RestuneError("The structure of this base lacks up_block_types or layers_per_block.") from error
    if depth > blocks:
        raise RestuneError(f"This base has {blocks} up blocks, but grad_depth is {depth}; use {blocks} at most.")
    return [_skip(number) for number in range(sum(counts[:depth]))]


def text_states(states: Any) -> torch.Tensor | None:
    """Return the text states; with an IP-Adapter the argument is a tuple of text and image states."""
    return states[0] if isinstance(states, tuple) else states


def _enter_up_block(
    hooks: SiteHooks, sites: Sequence[str], module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    if not hooks.active():
        return None
    hooks.see(time=kwargs["temb"], text=text_states(kwargs.get("encoder_hidden_states")))
    skips = kwargs["res_hidden_states_tuple"]
    tuned = tuple(hooks.tuned(site, skip) for site, skip in zip(sites, skips, strict=True))
    return args, {**kwargs, "res_hidden_states_tuple": tuned}


def _skip(number: int) -> str:
    return str(SiteName("skip", number))


def _up(number: int) -> str:
    return str(SiteName("up", number))


def _skip_counts(base: Any) -> list[int]:
    """Return the number of skip features of each up block, in the order of `up_blocks`."""
    return [len(block.resnets) for block in base.up_blocks]


def _head(base: Any) -> nn.Module:
    """Return the module whose input is the site `out`: the output norm, or `conv_out` if there is no norm."""
    norm = base.conv_norm_out
    head = norm if isinstance(norm, nn.Module) else base.conv_out
    assert isinstance(head, nn.Module)
    return head


def _unet_sites(base: Any) -> Iterator[tuple[str, Site]]:
    stride, index = 1, 0
    yield from embedding_groups(base)
    yield _skip(0), Site(channels=base.conv_in.out_channels, stride=stride)
    for number, block in enumerate(base.down_blocks):
        yield from _operation_sites(f"down.{number}", block, stride)
        for resnet in block.resnets:
            index += 1
            yield _skip(index), Site(channels=resnet.out_channels, stride=stride)
        if getattr(block, "downsamplers", None):
            index, stride = index + 1, stride * 2
            yield _skip(index), Site(channels=block.resnets[-1].out_channels, stride=stride)
    if index + 1 != sum(_skip_counts(base)):
        raise RestuneError(
            f"This {type(base).__name__} has blocks whose skip connections are not supported: the encoder outputs "
            f"{index + 1} and the decoder takes {sum(_skip_counts(base))}."
        )
    if getattr(base, "mid_block", None) is not None:
        yield from _operation_sites(MID, base.mid_block, stride)
        yield MID, Site(channels=base.mid_block.resnets[-1].out_channels, stride=stride)
    for number, block in enumerate(base.up_blocks):
        yield from _operation_sites(_up(number), block, stride)
        if getattr(block, "upsamplers", None):
            stride //= 2
        yield _up(number), Site(channels=block.resnets[-1].out_channels, stride=stride)
    yield OUT, Site(channels=base.conv_out.in_channels, stride=stride)
    yield from head_group(base)


def _operation_sites(stage: str, block: Any, stride: int) -> Iterator[tuple[str, Site]]:
    """Yield the sites of a U-Net block's transformer blocks and layer groups."""
    yield from block_groups(stage, block, stride)
    for number, attention in enumerate(getattr(block, "attentions", None) or ()):
        # Blocks without cross-attention have plain attention instead of a transformer; tuners do not attach there.
        for index, transformer in enumerate(getattr(attention, "transformer_blocks", ())):
            yield from block_sites(f"{stage}.attn.{number}.block.{index}", transformer, stride)
