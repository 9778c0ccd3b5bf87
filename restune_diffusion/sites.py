"""Find the places on a base where a tuner can read a feature or add a residual, and describe the base."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from .errors import BaseMismatchError, RestuneError

# Keys of a U-Net's config that decide which tuner fits. `in_channels` is left out on purpose: an inpainting
# checkpoint has the same skip paths as its text-to-image sibling, and takes the same tuners.
_STRUCTURE_KEYS = (
    "down_block_types",
    "mid_block_type",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
)

_OPERATION_SITE = re.compile(r"(down|mid|up)(?:\.(\d+))?\.attn\.(\d+)\.block\.(\d+)\.(self|cross|ff|block)(?:\.(.+))?")
Kind: TypeAlias = Literal["self", "cross", "ff", "block"]
_PATH_OF_OPERATION: dict[Kind, str] = {"self": "attn1", "cross": "attn2", "ff": "ff", "block": ""}


class Site(BaseModel):
    """A named place on the base."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: int = Field(gt=0, le=1 << 16)
    """Width of the feature there."""
    stride: int = Field(gt=0, le=1 << 10)
    """Spatial downscale against the latent."""
    operation: Kind | None = None
    """What runs there, for a site of a transformer block; its features are `(batch, tokens, channels)`."""
    heads: int = Field(default=0, ge=0, le=1 << 10)
    """Attention heads of the operation, or of the block's first attention where it has none of its own."""
    linears: dict[str, tuple[int, int]] = Field(default={}, max_length=64)
    """Linear layers of the operation by their path in it: input and output width."""


class BaseInfo(BaseModel):
    """The structure of a base: what a tuner file records and is checked against."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    denoiser: str
    """Class name, for instance `UNet2DConditionModel`."""
    structure: dict[str, Any]
    """The part of the model's config that decides which tuner fits."""
    sites: dict[str, Site]
    """In the order of the forward pass: `skip.0` (shallow) to `skip.N`, `mid`, `up.0` to `up.N`, `out`, and for each
    transformer block, say `down.1.attn.0.block.0`, its `.self`, `.cross`, `.ff` and `.block`."""
    time_channels: int = Field(gt=0, le=1 << 16)
    """Width of the time embedding."""
    name: str = ""
    """The base's hub id or folder name; informative, never compared."""

    @property
    def maps(self) -> list[str]:
        """Names of the sites whose features are maps, `(batch, channels, height, width)`."""
        return [name for name, site in self.sites.items() if site.operation is None]

    def narrowed(self, operations: Iterable[str]) -> BaseInfo:
        """Leave out the sites of transformer blocks but those named: a tuner asks of a base no more than it uses."""
        kept = set(operations)
        sites = {name: site for name, site in self.sites.items() if site.operation is None or name in kept}
        return self.model_copy(update={"sites": sites})

    def check_fits(self, other: BaseInfo) -> None:
        """Raise `BaseMismatchError` naming the first difference to another base's structure, if there is one."""
        for what, ours, theirs in self._differences(other):
            raise BaseMismatchError(
                f"This tuner was made for a base with {what} = {ours}, but the base here has {what} = {theirs}; "
                f"use it with {self.name or 'a checkpoint of the structure that it was trained on'}."
            )

    def _differences(self, other: BaseInfo) -> Iterator[tuple[str, object, object]]:
        if self.denoiser != other.denoiser:
            yield "denoiser", self.denoiser, other.denoiser
        for key in sorted(self.structure.keys() | other.structure.keys()):
            if self.structure.get(key) != other.structure.get(key):
                yield key, self.structure.get(key), other.structure.get(key)
        # Sites that only the other one has are of no interest: a file may record no more than its tuner needs.
        for site in self.sites:
            if self.sites[site] != other.sites.get(site):
                yield f"site {site}", self.sites[site], other.sites.get(site)
        if self.time_channels != other.time_channels:
            yield "time embedding width", self.time_channels, other.time_channels


def describe_base(base: nn.Module) -> BaseInfo:
    """Read the sites and the structural fingerprint off a base.

    Args:
        base: a `UNet2DConditionModel`.

    Raises:
        RestuneError: if the model is no U-Net with skip connections that this can read.
    """
    base = getattr(base, "_orig_mod", base)  # of a compiled model
    if "UNet2DConditionModel" not in {cls.__name__ for cls in type(base).__mro__}:
        raise RestuneError(f"Tuners attach to a UNet2DConditionModel, but this is a {type(base).__name__}.")
    config: Any = base.config
    structure = {key: _plain(config[key]) for key in _STRUCTURE_KEYS if key in config}
    return BaseInfo(
        denoiser=type(base).__name__,
        structure=structure,
        sites=dict(_unet_sites(base)),
        time_channels=_time_channels(base),
        name=_public_name(str(config.get("_name_or_path") or "")),
    )


def module_path(site: str) -> str:
    """Return the path in a `UNet2DConditionModel` of what runs at a site of a transformer block.

    Args:
        site: for instance `down.1.attn.0.block.0.ff`, or one of its linear layers, `mid.attn.0.block.0.self.to_q`.
    """
    match = _OPERATION_SITE.fullmatch(site)
    assert match is not None, site
    stage, number, attention, block, operation, linear = match.groups()
    parent = "mid_block" if stage == "mid" else f"{stage}_blocks.{number}"
    transformer = f"attentions.{attention}.transformer_blocks.{block}"
    path = [parent, transformer, _PATH_OF_OPERATION[operation], linear]  # type: ignore[index]
    return ".".join(step for step in path if step)


def site_module(base: nn.Module, site: str) -> nn.Module:
    """Return the module that runs at a site of a transformer block, or one of its linear layers.

    Args:
        base: a `UNet2DConditionModel`.
        site: for instance `down.1.attn.0.block.0.ff` or `mid.attn.0.block.0.self.to_q`.
    """
    return _without_lora(base.get_submodule(module_path(site)))


def skip_counts(base: nn.Module) -> list[int]:
    """Number of skip features that each up block takes, in the order of `up_blocks`."""
    return [len(block.resnets) for block in base.up_blocks]  # type: ignore[union-attr]


def merge_module(base: nn.Module) -> nn.Module:
    """Return the module whose input is the site `out`: the output norm, or `conv_out` where there is none."""
    norm = base.conv_norm_out
    return norm if isinstance(norm, nn.Module) else base.conv_out  # type: ignore[return-value]


def _unet_sites(base: Any) -> Iterator[tuple[str, Site]]:
    stride, index = 1, 0
    yield "skip.0", Site(channels=base.conv_in.out_channels, stride=stride)
    for number, block in enumerate(base.down_blocks):
        yield from _operation_sites(f"down.{number}", block, stride)
        for resnet in block.resnets:
            index += 1
            yield f"skip.{index}", Site(channels=resnet.out_channels, stride=stride)
        if getattr(block, "downsamplers", None):
            index, stride = index + 1, stride * 2
            yield f"skip.{index}", Site(channels=block.resnets[-1].out_channels, stride=stride)
    if index + 1 != sum(skip_counts(base)):
        raise RestuneError(
            f"This {type(base).__name__} has blocks whose skip connections are not understood: the encoder makes "
            f"{index + 1} and the decoder takes {sum(skip_counts(base))}."
        )
    if getattr(base, "mid_block", None) is not None:
        yield from _operation_sites("mid", base.mid_block, stride)
        yield "mid", Site(channels=base.mid_block.resnets[-1].out_channels, stride=stride)
    for number, block in enumerate(base.up_blocks):
        yield from _operation_sites(f"up.{number}", block, stride)
        if getattr(block, "upsamplers", None):
            stride //= 2
        yield f"up.{number}", Site(channels=block.resnets[-1].out_channels, stride=stride)
    yield "out", Site(channels=base.conv_out.in_channels, stride=stride)


def _operation_sites(stage: str, block: Any, stride: int) -> Iterator[tuple[str, Site]]:
    """Yield the sites of a U-Net block's transformer blocks."""
    for number, attention in enumerate(getattr(block, "attentions", None) or ()):
        # Blocks without text have plain attention instead of a transformer; nothing attaches there.
        for index, transformer in enumerate(getattr(attention, "transformer_blocks", ())):
            yield from _block_sites(f"{stage}.attn.{number}.block.{index}", transformer, stride)


def _block_sites(name: str, block: Any, stride: int) -> Iterator[tuple[str, Site]]:
    channels, heads = block.attn1.to_q.in_features, block.attn1.heads
    for operation, path in _PATH_OF_OPERATION.items():
        module = block.get_submodule(path) if getattr(block, path or "attn1", None) is not None else None
        if module is None:
            continue
        linears = {} if operation == "block" else dict(_linears(module))
        yield (
            f"{name}.{operation}",
            Site(
                channels=channels,
                stride=stride,
                operation=operation,
                heads=getattr(module, "heads", heads),
                linears=linears,
            ),
        )


def _linears(module: nn.Module, path: str = "") -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield path and widths of the base's linear layers below a module."""
    layer = _without_lora(module)
    if isinstance(layer, nn.Linear):
        yield path, (layer.in_features, layer.out_features)
        return
    for name, child in module.named_children():
        # An attention's processor is no part of the base; that of an IP-Adapter has layers.
        if name != "processor":
            yield from _linears(child, f"{path}.{name}" if path else name)


def _without_lora(module: nn.Module) -> nn.Module:
    """Return the layer that PEFT wraps while a LoRA is loaded: it is there with and without."""
    return getattr(module, "base_layer", module)


def _time_channels(base: Any) -> int:
    return int(base.time_embedding.linear_2.out_features)


def _public_name(source: str) -> str:
    """Name a checkpoint by its hub id, or by its folder alone: a shared file must not tell a person's paths."""
    path = Path(source)
    if not source or not path.exists():
        return source
    path = path.resolve()
    return path.parent.name if path.name == "unet" else path.name


def _plain(value: object) -> object:
    """Make a config value compare equal to itself after a round trip through JSON."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
