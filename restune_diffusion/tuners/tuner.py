"""`Tuner`: part configs, and their modules built for the structure of one base."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, Self

import torch
from torch import nn

from ..backbones import BaseInfo, TextEncoder, describe_base, describe_text, text_encoders
from ..utils.errors import RestuneError
from .base import Part
from .registry import PartConfig, tuner_family


class Follower(Protocol):
    """Object with tensors that belong on the device of a tuner."""

    def tuner_moved(self) -> None:
        """Move the tensors to the device of the tuner."""


class Tuner(nn.Module):
    """Tuner for a base, the unit that users train, name, load and share. It contains no weights of the base.

    Create a tuner with `Tuner.for_base`, or read one with `restune_diffusion.load_tuner`. The constructor leaves the
    parameters with torch's default initialization; call `reset_parameters` to initialize them.

    Args:
        configs: one config per part; each family may appear once.
        base: structure of the base for which the tuner is built.
        metadata: metadata for the tuner's file.
    """

    def __init__(
        self, configs: tuple[PartConfig, ...], base: BaseInfo, metadata: Mapping[str, str] | None = None
    ) -> None:
        super().__init__()
        families = [config.part for config in configs]
        if not families or len(set(families)) != len(families):
            raise RestuneError(f"A tuner needs one or more parts, each of another family, but got {families}.")
        self.configs = configs
        self.metadata = dict(metadata or {})
        self._followers: weakref.WeakSet[Follower] = weakref.WeakSet()
        self.shared = False
        """Whether the parameters are shared, for instance by a `TunerCache`; attaching then makes a copy."""
        self.autocast: torch.dtype | None = None
        """Dtype of the autocast in which the parts run; None runs them in the dtype of their parameters."""
        for config in configs:
            if hasattr(self, config.part):
                raise RestuneError(f"A tuner family cannot have the name `{config.part}`, an attribute of `Tuner`.")
            self.add_module(config.part, tuner_family(config.part).build(config, base))
        self._check_single("takes condition images", [bool(part.conditions) for part in self.parts()])
        self._check_single("acts on text encoders", [bool(part.text_encoders) for part in self.parts()])
        self.base = base.narrowed(
            (site for part in self.parts() for site in part.needs),
            (encoder for part in self.parts() for encoder in part.text_encoders),
        )

    @classmethod
    def for_base(
        cls,
        base: nn.Module,
        *configs: PartConfig,
        generator: torch.Generator | None = None,
        text: Mapping[str, TextEncoder] | None = None,
    ) -> Tuner:
        """Build a new tuner for a base; before training, it does not change the base's output.

        Args:
            base: a `UNet2DConditionModel`.
            configs: one config per part.
            generator: random generator for the initial parameters, on the CPU.
            text: text encoders by name, as `text_encoders(pipeline)` returns them; a `text` part needs them.

        Returns:
            A tuner with fp32 parameters on the CPU.
        """
        described = describe_base(base)
        # Described only for parts that need them, because the text encoders may be of an unsupported type.
        if any(config.acts_on_text_encoders for config in configs):
            described = described.model_copy(update={"text": describe_text(text or {})})
        tuner = cls.empty(configs, described).to_empty(device="cpu")
        tuner.reset_parameters(generator)
        for part in tuner.parts():
            part.initialize_from(text or {})
        return tuner

    @classmethod
    def for_pipeline(cls, pipeline: Any, *configs: PartConfig, generator: torch.Generator | None = None) -> Tuner:
        """Build a new tuner for a pipeline's U-Net and text encoders; see `for_base`."""
        return cls.for_base(pipeline.unet, *configs, generator=generator, text=text_encoders(pipeline))

    @classmethod
    def empty(
        cls, configs: tuple[PartConfig, ...], base: BaseInfo, metadata: Mapping[str, str] | None = None
    ) -> Tuner:
        """Build a tuner on the meta device, where parameters have shapes but no memory."""
        with torch.device("meta"):
            return cls(configs, base, metadata)

    def _check_single(self, what: str, does: list[bool]) -> None:
        names = [config.part for config, it_does in zip(self.configs, does, strict=True) if it_does]
        if len(names) > 1:
            raise RestuneError(f"Only one part of a tuner {what}, but got {' and '.join(names)}; use one of them.")

    def parts(self) -> Iterator[Part]:
        """Yield the parts in the order of their configs."""
        for child in self.children():
            assert isinstance(child, Part)
            yield child

    def copy(self) -> Tuner:
        """Return a copy with its own parameters, which are not shared."""
        twin = copy.deepcopy(self)
        twin.shared = False
        return twin

    def add_follower(self, follower: Follower) -> None:
        """Call `tuner_moved` of an object after each move of the tuner; the tuner does not keep it alive."""
        self._followers.add(follower)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no followers.
        return {**self.__dict__, "_followers": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._followers = weakref.WeakSet()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for follower in self._followers:
            follower.tuner_moved()
        return self

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize all parameters; every residual is zero afterwards."""
        with torch.no_grad():
            for part in self.parts():
                part.reset_parameters(generator)

    def precision(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return the context manager in which the parts run on a device: autocast, if it is set."""
        return nullcontext() if self.autocast is None else torch.autocast(device.type, self.autocast)

    def num_parameters(self) -> int:
        """Return the number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return next(self.parameters()).dtype
