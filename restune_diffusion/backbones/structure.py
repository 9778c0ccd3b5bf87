"""What the rest of the program asks of a kind of base, whichever it is."""

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
    """What a base's hooks call when a forward pass reaches a site."""

    def active(self) -> bool:
        """Say whether any tuner takes part in this pass."""

    def tuned(self, site: str, x: torch.Tensor) -> torch.Tensor:
        """Return the feature at a site with the residuals of all tuners, and keep it for those that tap it."""

    def tap(self, site: str, x: torch.Tensor) -> None:
        """Keep a feature that is only read, if a tuner asks for it."""

    def see(self, *, time: torch.Tensor | None = None, text: torch.Tensor | None = None) -> None:
        """Show the time embedding or the text states of this pass."""


class Call(NamedTuple):
    """What a call of the base tells of its batch."""

    rows: int
    size: tuple[int, int]
    """Height and width of what it is called on, in the unit of the sites' strides."""
    device: torch.device
    timestep: torch.Tensor | float
    frames: int = 1
    """How many rows stand side by side at the sites for each row of the batch: the frames of a video."""


class Structure(ABC):
    """A kind of base: where its sites are and how its hooks reach them."""

    class_name: ClassVar[str]
    """Name of the model's class, or of one that it extends."""
    keys: ClassVar[tuple[str, ...]]
    """Keys of the model's config that decide which tuner fits."""

    def fits(self, base: nn.Module) -> bool:
        """Say whether a model is of this kind."""
        # By name, so that nothing is imported for a kind that is not used.
        return self.class_name in {cls.__name__ for cls in type(base).__mro__}

    def describe(self, base: Any) -> BaseInfo:
        """Read the sites and the structural fingerprint off a model.

        Raises:
            RestuneError: if the model has blocks that are not understood.
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
        """Return the width of the time embedding; 0 where there is none."""

    @abstractmethod
    def module_path(self, site: str) -> str:
        """Return the path of what runs at a site of a transformer block, or at one of its linear layers."""

    @abstractmethod
    def install(self, base: Any, hooks: SiteHooks) -> list[RemovableHandle]:
        """Hook the sites between the blocks; the residuals of operations are hooked where a tuner needs them."""

    @abstractmethod
    def call(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Read off the arguments of the model's forward what the batch is."""

    def run_head(self, base: Any, x: torch.Tensor) -> torch.Tensor:
        """Return the base's output from the feature at its site `out`; none of its blocks runs.

        Args:
            base: a model of this kind.
            x: the feature, in the base's dtype: `(batch, channels, height, width)`, or `(batch, tokens, channels)` of
                a transformer.

        Raises:
            RestuneError: if the output head of this kind needs more than the feature.
        """
        raise RestuneError(
            f"The output head of {self.class_name} cannot run on recorded features, as it depends on the time step "
            f"too; attach the tuner and run the whole base."
        )

    def module(self, base: nn.Module, site: str) -> nn.Module:
        """Return what runs at a site of a transformer block, or at one of its linear layers."""
        return without_lora(base.get_submodule(self.module_path(site)))


def _public_name(source: str) -> str:
    """Name a checkpoint by its hub id, or by its folder alone: a shared file must not tell a person's paths."""
    path = Path(source)
    if not source or not path.exists():
        return source
    path = path.resolve()
    return path.parent.name if path.name in ("unet", "transformer") else path.name


def _plain(value: object) -> object:
    """Make a config value compare equal to itself after a round trip through JSON."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
