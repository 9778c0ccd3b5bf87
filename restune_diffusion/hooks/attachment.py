"""Attach tuners to a base, and take them off without a trace."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from torch import nn

from ..backbones import TextEncoder, describe_base
from ..tuners.tuner import Tuner
from ..utils.errors import TunerNameError
from .manager import TunerManager, is_compiled, refuse_if, uncompiled
from .weights import Weight


class Attachment:
    """A tuner on a base; `detach` takes it off, and so does leaving a `with` block."""

    def __init__(self, base: nn.Module, name: str) -> None:
        self._base = base
        self.name = name

    def detach(self) -> None:
        """Take the tuner off; raises `TunerNameError` if it is no longer there."""
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
    """Attach a tuner to a base, changing no parameter of it.

    Args:
        base: a `UNet2DConditionModel`. Once it is compiled, only tuners that need no further hooks attach: those
            whose sites attached ones already write to, and those on skip connections and the output head beside any
            other.
        tuner: a tuner that was made for a base of this structure.
        name: name of the tuner on this base.
        weight: how strongly it acts: a factor, one for each image of a batch, or any other form of `Weight`.
        text: what a `text` part acts on, as `text_encoders(pipeline)` returns it. New words are known to prompts that
            a pipeline with `RestuneLoaderMixin` encodes.

    Returns:
        A handle that detaches the tuner, also as a context manager.

    Raises:
        TunerNameError: if the name is taken.
        RestuneError: if the tuner has a `text` part and the text encoders are not given.
        BaseMismatchError: if the tuner was made for a base of another structure.
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
    """Take a tuner off a base; after the last one the base is as it was, without hooks.

    Raises:
        TunerNameError: if no tuner of this name is attached.
    """
    manager = TunerManager.of(base)
    if manager is None:
        raise TunerNameError(f"No tuner named {name!r} is loaded; loaded: none.")
    manager.remove(name)
