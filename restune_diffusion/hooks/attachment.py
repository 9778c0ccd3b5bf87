"""Attach tuners to a base and detach them, which restores the base exactly."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from torch import nn

from ..backbones import TextEncoder, describe_base
from ..tuners.tuner import Tuner
from ..utils.errors import TunerNameError
from .compiled import is_compiled, refuse_if, uncompiled
from .manager import TunerManager
from .weights import Weight


class Attachment:
    """Handle of an attached tuner; `detach` or leaving a `with` block removes the tuner."""

    def __init__(self, base: nn.Module, name: str) -> None:
        self._base = base
        self.name = name

    def detach(self) -> None:
        """Detach the tuner; raise `TunerNameError` if it is no longer attached."""
        detach(self._base, self.name)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def attach(
    base: nn.Module,
    tuner: Tuner,
    name: str = "default",
    weight: Weight = 1.0,
    *,
    text: Mapping[str, TextEncoder] | None = None,
) -> Attachment:
    """Attach a tuner to a base without changing the base's parameters.

    Args:
        base: a supported model, e.g. a `UNet2DConditionModel`. After compilation, only tuners that need no further
            hooks can be attached: those that write to sites of attached tuners, and, if any tuner is attached, those
            on skip connections and the output head.
        tuner: a tuner for a base of this structure.
        name: name of the tuner on this base.
        weight: weight of the tuner: a factor, one factor per image of a batch, or any other form of `Weight`.
        text: text encoders for a `text` part, as returned by `text_encoders(pipeline)`. Its placeholder tokens apply
            to prompts that a pipeline with `RestuneLoaderMixin` encodes.

    Returns:
        A handle that detaches the tuner, also usable as a context manager.

    Raises:
        TunerNameError: if the name is taken.
        RestuneError: if the tuner has a `text` part and `text` is not given, or the base is compiled and further hooks
            are needed.
        BaseMismatchError: if the tuner is for a base of another structure.
    """
    manager = TunerManager.of(base)
    if manager is None:
        refuse_if(is_compiled(base))
        tuner.base.check_fits(describe_base(base))
        manager = TunerManager(base)
    try:
        manager.add(name, tuner, weight, text)
    finally:
        manager.release()
    return Attachment(uncompiled(base), name)


def detach(base: nn.Module, name: str = "default") -> None:
    """Detach a tuner from a base; detaching the last one removes all hooks and restores the base.

    Raises:
        TunerNameError: if no tuner with this name is attached.
    """
    manager = TunerManager.of(base)
    if manager is None:
        raise TunerNameError(f"No tuner named {name!r} is loaded; loaded: none.")
    manager.remove(name)
