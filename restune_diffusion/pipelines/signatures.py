"""Signatures of methods that wrap a pipeline's method: the pipeline's parameters, followed by those of the mixin."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

from .call_options import MixPerImage
from .control_images import TunerImage, TunerScale

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)
Method = TypeVar("Method", bound=Callable[..., Any])


class CallWithTuners(Protocol[P, R_co]):
    """Type of a pipeline's `__call__` with tuners, for editors and type checkers.

    A `ParamSpec` cannot be extended by keyword parameters, so the pipeline's and ours are two overloads, and editors
    complete the keywords of both.
    """

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...

    @overload
    def __call__(
        self,
        *args: Any,
        tuners: MixPerImage | None = None,
        tuner_image: TunerImage | None = None,
        tuner_conditioning_scale: TunerScale = 1.0,
        **kwargs: Any,
    ) -> R_co: ...


if TYPE_CHECKING:

    def call_with_tuners(call: Callable[Concatenate[Any, P], R_co]) -> Callable[[Any], CallWithTuners[P, R_co]]:
        """Declare a method as the `__call__` of a pipeline with tuners."""
        ...

    def same_as(method: Method) -> Callable[[Any], Method]:
        """Declare a method with the signature of another."""
        ...


def adopt_signature(cls: type, mixin: type, name: str) -> None:
    """Set a copy of a mixin's method on a class, with the signature and docstring of the method that it wraps.

    `inspect.signature` and `help` then show the parameters of the installed diffusers version, in its order, followed
    by the mixin's keyword-only parameters. A class that overrides the method, inherits such a copy, or has no method
    to wrap, is not changed.

    Args:
        cls: a subclass of the mixin.
        mixin: the class whose method calls `super()`.
        name: name of the method.
    """
    own = getattr(mixin, name)
    parent = getattr(super(mixin, cls), name, None)
    if parent is None or getattr(cls, name) is not own:
        return

    @functools.wraps(parent)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    # Annotations are evaluated here: strings would be resolved in diffusers' module.
    parameters = inspect.signature(own, eval_str=True).parameters.values()
    added = [parameter for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    method.__signature__ = extended(inspect.signature(parent), added)  # type: ignore[attr-defined]
    added_types = {parameter.name: parameter.annotation for parameter in added}
    method.__annotations__ = {**method.__annotations__, **added_types}
    method.__doc__ = "\n\n".join(inspect.cleandoc(text).strip() for text in (parent.__doc__, own.__doc__) if text)
    method.__module__, method.__qualname__ = cls.__module__, f"{cls.__qualname__}.{name}"
    setattr(cls, name, method)


def extended(signature: inspect.Signature, added: list[inspect.Parameter]) -> inspect.Signature:
    """Append keyword-only parameters to a signature; the others keep their positions, and `**kwargs` stays last."""
    names = {parameter.name for parameter in added}
    kept = [parameter for name, parameter in signature.parameters.items() if name not in names]
    rest = [kept.pop()] if kept and kept[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    return signature.replace(parameters=[*kept, *added, *rest])
