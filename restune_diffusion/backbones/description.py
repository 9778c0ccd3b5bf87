"""What is known of a base without having it: its structure and the sites where tuners attach."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..utils.errors import BaseMismatchError
from .site_names import Kind, of_family


class Site(BaseModel):
    """A named place on the base."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: int = Field(gt=0, le=1 << 16)
    """Width of the feature there."""
    stride: int = Field(gt=0, le=1 << 10)
    """Spatial downscale against the latent."""
    operation: Kind | None = None
    """What runs there, for a site of a transformer block; its features are `(batch, tokens, channels)`."""
    tokens: bool = False
    """Whether the feature is a row of tokens, `(batch, tokens, channels)`, although nothing runs there."""
    extra_tokens: int = Field(default=0, ge=0, le=1 << 10)
    """Tokens before those of the grid, such as a class token, which have no place in it."""
    heads: int = Field(default=0, ge=0, le=1 << 10)
    """Attention heads of the operation, or of the block's first attention where it has none of its own."""
    linears: dict[str, tuple[int, int]] = Field(default={}, max_length=64)
    """Linear layers of the operation by their path in it: input and output width."""

    def projection(self, which: Literal["k", "v"]) -> tuple[int, int]:
        """Return input and output width of the layer that makes attention's keys or values."""
        # As diffusers and as transformers call it.
        return self.linears.get(f"to_{which}") or self.linears[f"{which}_proj"]


class TextInfo(BaseModel):
    """The structure of a text encoder, in transformers' words."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hidden_size: int = Field(gt=0, le=1 << 16)
    """Width of its states and of its words' vectors."""
    num_hidden_layers: int = Field(gt=0, le=1 << 8)
    """Number of its layers."""
    vocab_size: int = Field(gt=0, le=1 << 24)
    """Number of words that it knows by itself."""
    linears: dict[str, tuple[int, int]] = Field(max_length=64)
    """Linear layers of each of its layers by their path in it: input and output width."""


class BaseInfo(BaseModel):
    """The structure of a base: what a tuner file records and is checked against."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    denoiser: str
    """Class name, for instance `UNet2DConditionModel`."""
    structure: dict[str, Any]
    """The part of the model's config that decides which tuner fits."""
    sites: dict[str, Site]
    """In the order of the forward pass. Of a U-Net: `skip.0` (shallow) to `skip.N`, `mid`, `up.0` to `up.N`, `out`,
    and for each transformer block, say `down.1.attn.0.block.0`, its `.self`, `.cross`, `.ff` and `.block`. Of a
    transformer: `block.0` to `block.N`, its `.self`, `.cross`, `.ff` and `.block`, and `out`."""
    time_channels: int = Field(ge=0, le=1 << 16)
    """Width of the time embedding; 0 where the base knows no time."""
    text: dict[str, TextInfo] = Field(default={}, max_length=4)
    """Text encoders by their name in a pipeline, where a tuner acts on them."""
    name: str = ""
    """The base's hub id or folder name; informative, never compared."""

    @property
    def stations(self) -> list[str]:
        """Names of the sites between the base's blocks: all but those of operations."""
        return [name for name, site in self.sites.items() if site.operation is None]

    @property
    def skips(self) -> list[str]:
        """Names of the skip connections' sites, from the shallowest; none for a transformer."""
        return of_family(self.sites, "skip")

    def narrowed(self, operations: Iterable[str], encoders: Iterable[str] = ()) -> BaseInfo:
        """Leave out the sites of transformer blocks and the text encoders but those named.

        A tuner asks of a base no more than it uses.
        """
        kept = set(operations)
        text = {name: self.text[name] for name in encoders}
        sites = {name: site for name, site in self.sites.items() if site.operation is None or name in kept}
        return self.model_copy(update={"sites": sites, "text": text})

    def check_fits(self, other: BaseInfo) -> None:
        """Raise `BaseMismatchError` naming the first difference to another base's structure, if there is one."""
        for what, ours, theirs in self._differences(other):
            raise BaseMismatchError(
                f"This tuner was made for a base with {what} = {ours}, but the base here has {what} = {theirs}; "
                f"use it with {self.name or 'a checkpoint of the structure that it was trained on'}."
            )

    def check_text_fits(self, encoders: Mapping[str, TextInfo]) -> None:
        """Raise `BaseMismatchError` naming the first difference to a pipeline's text encoders, if there is one."""
        for name, ours in self.text.items():
            if name not in encoders:
                raise BaseMismatchError(
                    f"This tuner acts on `{name}`, which the pipeline has not; "
                    f"use it with {self.name or 'a checkpoint of the structure that it was trained on'}."
                )
            for key, value in ours:
                theirs = getattr(encoders[name], key)
                if theirs != value:
                    raise BaseMismatchError(
                        f"This tuner was made for a {name} with {key} = {value}, but the one here has {key} = "
                        f"{theirs}; use it with {self.name or 'a checkpoint of the structure that it was trained on'}."
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
