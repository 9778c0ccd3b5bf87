"""Interface of a supported base model class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..utils.errors import RestuneError
from .description import BaseInfo, Site
from .transformer_block import without_lora


class SiteHooks(Protocol):
    """Callbacks of a base's torch hooks, called when a forward pass reaches a site."""

    def active(self) -> bool:
        """Return whether any tuner is active in this forward pass."""

    def tuned(self, site: str, x: torch.Tensor) -> torch.Tensor:
        """Return the feature at a site plus the residuals of all tuners; store it for tuners that tap the site."""

    def tap(self, site: str, x: torch.Tensor) -> None:
        """Store a feature that is only read, if a tuner taps the site."""

    def see(self, *, time: torch.Tensor | None = None, text: torch.Tensor | None = None) -> None:
        """Store the time embedding or the text states of this forward pass."""


class Call(NamedTuple):
    """Batch size, input size, device and timestep of one call of a base."""

    rows: int
    """Batch size."""
    size: tuple[int, int]
    """Height and width of the input, in the unit of the sites' strides."""
    device: torch.device
    timestep: torch.Tensor | float
    frames: int = 1
    """Number of adjacent rows at the sites for each row of the batch: the frames of a video."""


class Structure(ABC):
    """Structure of one class of base models: its sites, and the torch hooks that reach them."""

    class_name: ClassVar[str]
    """Name of the model's class or of one of its base classes."""
    keys: ClassVar[tuple[str, ...]]
    """Keys of the model's config that determine which tuners fit."""

    def fits(self, base: nn.Module) -> bool:
        """Return whether a model has this structure."""
        # Compared by name, so that unused model classes are not imported.
        return self.class_name in {cls.__name__ for cls in type(base).__mro__}

    def describe(self, base: Any) -> BaseInfo:
        """Return the sites and the structural fingerprint of a model.

        Raises:
            RestuneError: if the model has blocks that are not supported.
        """
        config = {key: getattr(base.config, key, None) for key in (*self.keys, "_name_or_path")}
        return BaseInfo(
            denoiser=type(base).__name__,
            structure={key: _plain(config[key]) for key in self.keys if hasattr(base.config, key)},
            sites=dict(self.sites(base)),
            time_channels=self.time_channels(base),
            name=_public_name(str(config["_name_or_path"] or "")),
        )

    @abstractmethod
    def sites(self, base: Any) -> Iterator[tuple[str, Site]]:
        """Yield the sites in the order of the forward pass."""

    @abstractmethod
    def time_channels(self, base: Any) -> int:
        """Return the width of the time embedding; 0 if there is none."""

    @abstractmethod
    def module_path(self, site: str) -> str:
        """Return the path of the module at a site of a transformer block, or of one of its linear layers."""

    @abstractmethod
    def install(self, base: Any, hooks: SiteHooks) -> list[RemovableHandle]:
        """Register hooks on the sites between the blocks; operations are hooked only where a tuner writes to them."""

    @abstractmethod
    def call(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Return batch size, input size, device and timestep from the arguments of the model's forward."""

    def run_head(self, base: Any, x: torch.Tensor) -> torch.Tensor:
        """Return the base's output from the feature at the site `out`, without running any block.

        Args:
            base: a model with this structure.
            x: the feature, in the base's dtype: `(batch, channels, height, width)`, or `(batch, tokens, channels)`
                for a transformer.

        Raises:
            RestuneError: if the output head needs more inputs than the feature.
        """
        raise RestuneError(
            f"The output head of {self.class_name} cannot run on recorded features, because it also needs the "
            f"timestep; attach the tuner and run the whole base."
        )

    def module(self, base: nn.Module, site: str) -> nn.Module:
        """Return the module at a site of a transformer block, or one of its linear layers."""
        return without_lora(base.get_submodule(self.module_path(site)))


def _public_name(source: str) -> str:
    """Return a checkpoint's hub id or the name of its folder: a shared file must not reveal private paths."""
    path = Path(source)
    if not source or not path.exists():
        return source
    path = path.resolve()
    return path.parent.name if path.name in ("unet", "transformer") else path.name


def _plain(value: object) -> object:
    """Convert tuples of a config value to lists, so that it is equal to itself after a round trip through JSON."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
