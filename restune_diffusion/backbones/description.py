"""Description of a base that needs no model: its structure and the sites where tuners attach."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from ..utils.errors import BaseMismatchError
from .site_names import Kind, of_family


class Convolution(NamedTuple):
    """Shape of a convolution with a square kernel."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    padding: int


class Site(BaseModel):
    """Named place in a base where a tuner reads a feature or adds a residual."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: int = Field(gt=0, le=1 << 16)
    """Number of channels of the feature."""
    stride: int = Field(gt=0, le=1 << 10)
    """Spatial downscaling relative to the latent."""
    operation: Kind | None = None
    """Operation at a site of a transformer block, with features `(batch, tokens, channels)`, or kind of a group of
    layers; None between blocks."""
    tokens: bool = False
    """Whether the feature is a token sequence `(batch, tokens, channels)` at a site without an operation."""
    extra_tokens: int = Field(default=0, ge=0, le=1 << 10)
    """Number of tokens before the grid's tokens, such as a class token, that have no position in the grid."""
    heads: int = Field(default=0, ge=0, le=1 << 10)
    """Attention heads of the operation, or of the block's first attention if the operation has none."""
    linears: dict[str, tuple[int, int]] = Field(default={}, max_length=64)
    """Input and output width of the operation's linear layers, by path relative to the operation."""
    convolutions: dict[str, Convolution] = Field(default={}, max_length=64)
    """Shape of the convolutions of a group of layers, by path relative to the group."""

    @property
    def layers(self) -> dict[str, tuple[int, int] | Convolution]:
        """Linear layers and convolutions by path: input and output width, or shape."""
        return {**self.linears, **self.convolutions}

    def projection(self, which: Literal["k", "v"]) -> tuple[int, int]:
        """Return input and output width of the attention's key or value projection."""
        # The names in diffusers and in transformers.
        return self.linears.get(f"to_{which}") or self.linears[f"{which}_proj"]


class TextInfo(BaseModel):
    """Structure of a text encoder, with the field names of transformers' configs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hidden_size: int = Field(gt=0, le=1 << 16)
    """Width of the hidden states and of the token embeddings."""
    num_hidden_layers: int = Field(gt=0, le=1 << 8)
    """Number of transformer layers."""
    vocab_size: int = Field(gt=0, le=1 << 24)
    """Number of tokens in the original vocabulary."""
    linears: dict[str, tuple[int, int]] = Field(max_length=64)
    """Input and output width of the linear layers of each transformer layer, by path relative to the layer."""


class BaseInfo(BaseModel):
    """Structure of a base; a tuner file records it, and loading checks it against the base in use."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    denoiser: str
    """Class name of the model, e.g. `UNet2DConditionModel`."""
    structure: dict[str, Any]
    """Entries of the model's config that determine which tuners fit."""
    sites: dict[str, Site]
    """Sites by name, in the order of the forward pass. U-Net: `skip.0` (shallow) to `skip.N`, `mid`, `up.0` to `up.N`,
    `out`, and for each transformer block, e.g. `down.1.attn.0.block.0`, its `.self`, `.cross`, `.ff` and `.block`;
    groups of layers outside them, e.g. `down.1.attn.0` (its projections) and `down.1.resnet.0`.
    Transformer: `block.0` to `block.N`, each with `.self`, `.cross`, `.ff` and `.block`, and `out`."""
    time_channels: int = Field(ge=0, le=1 << 16)
    """Width of the time embedding; 0 if the base has none."""
    text: dict[str, TextInfo] = Field(default={}, max_length=4)
    """Text encoders that a tuner acts on, by their name in a pipeline."""
    name: str = ""
    """Hub id or folder name of the base; informative, not compared."""

    @property
    def stations(self) -> list[str]:
        """Names of the sites between the base's blocks, which have no operation."""
        return [name for name, site in self.sites.items() if site.operation is None]

    @property
    def skips(self) -> list[str]:
        """Names of the skip connections, from the shallowest; empty for a transformer."""
        return of_family(self.sites, "skip")

    def narrowed(self, operations: Iterable[str], encoders: Iterable[str] = ()) -> BaseInfo:
        """Return a description with only the named sites of operations and layer groups and the named text encoders.

        A tuner then fits every base that agrees in what the tuner uses.
        """
        kept = set(operations)
        text = {name: self.text[name] for name in encoders}
        sites = {name: site for name, site in self.sites.items() if site.operation is None or name in kept}
        return self.model_copy(update={"sites": sites, "text": text})

    def check_fits(self, other: BaseInfo) -> None:
        """Raise `BaseMismatchError` with the first difference from another base's structure, if there is one."""
        for what, ours, theirs in self._differences(other):
            raise BaseMismatchError(
                f"This tuner was made for a base with {what} = {ours}, but this base has {what} = {theirs}; "
                f"use it with {self.name or 'a checkpoint of the structure that it was trained for'}."
            )

    def check_text_fits(self, encoders: Mapping[str, TextInfo]) -> None:
        """Raise `BaseMismatchError` with the first difference from a pipeline's text encoders, if there is one."""
        for name, ours in self.text.items():
            if name not in encoders:
                raise BaseMismatchError(
                    f"This tuner acts on `{name}`, but the pipeline has no `{name}`; "
                    f"use it with {self.name or 'a checkpoint of the structure that it was trained for'}."
                )
            for key, value in ours:
                theirs = getattr(encoders[name], key)
                if theirs != value:
                    raise BaseMismatchError(
                        f"This tuner was made for a {name} with {key} = {value}, but this one has "
                        f"{key} = {theirs}; "
                        f"use it with {self.name or 'a checkpoint of the structure that it was trained for'}."
                    )

    def _differences(self, other: BaseInfo) -> Iterator[tuple[str, object, object]]:
        if self.denoiser != other.denoiser:
            yield "denoiser", self.denoiser, other.denoiser
        for key in sorted(self.structure.keys() | other.structure.keys()):
            if self.structure.get(key) != other.structure.get(key):
                yield key, self.structure.get(key), other.structure.get(key)
        # Sites that exist only in the other base are ignored: a file records only the sites that its tuner needs.
        for site in self.sites:
            if self.sites[site] != other.sites.get(site):
                yield f"site {site}", self.sites[site], other.sites.get(site)
        if self.time_channels != other.time_channels:
            yield "time embedding width", self.time_channels, other.time_channels
