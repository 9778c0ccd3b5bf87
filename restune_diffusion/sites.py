"""Find the places on a base where a tuner can read a feature or add a residual, and describe the base."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


class Site(BaseModel):
    """A named place on the base."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: int = Field(gt=0, le=1 << 16)
    """Width of the feature there."""
    stride: int = Field(gt=0, le=1 << 10)
    """Spatial downscale against the latent."""


class BaseInfo(BaseModel):
    """The structure of a base: what a tuner file records and is checked against."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    denoiser: str
    """Class name, for instance `UNet2DConditionModel`."""
    structure: dict[str, Any]
    """The part of the model's config that decides which tuner fits."""
    sites: dict[str, Site]
    """`skip.0` (shallow) to `skip.N`, `mid`, `up.0` to `up.N`, `out`: in the order of the forward pass."""
    time_channels: int = Field(gt=0, le=1 << 16)
    """Width of the time embedding."""
    name: str = ""
    """The base's hub id or folder name; informative, never compared."""

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
        for site in [*self.sites, *(other.sites.keys() - self.sites.keys())]:
            if self.sites.get(site) != other.sites.get(site):
                yield f"site {site}", self.sites.get(site), other.sites.get(site)
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
    for block in base.down_blocks:
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
        yield "mid", Site(channels=base.mid_block.resnets[-1].out_channels, stride=stride)
    for number, block in enumerate(base.up_blocks):
        if getattr(block, "upsamplers", None):
            stride //= 2
        yield f"up.{number}", Site(channels=block.resnets[-1].out_channels, stride=stride)
    yield "out", Site(channels=base.conv_out.in_channels, stride=stride)


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
