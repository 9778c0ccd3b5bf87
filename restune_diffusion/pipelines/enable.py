"""Add the methods of `RestuneLoaderMixin` to any diffusers pipeline with a U-Net."""

from __future__ import annotations

from functools import cache
from typing import Any

from diffusers import DiffusionPipeline

from ..backbones import describe_base
from ..utils.errors import RestuneError
from .loaders import RestuneLoaderMixin
from .saving import plain_class


def enable_restune(pipe: DiffusionPipeline) -> Any:
    """Return a pipeline with `load_tuner_weights`, `set_tuners` and the other methods of `RestuneLoaderMixin`.

    The result is an instance of a subclass of the pipeline's class with the mixin; the subclass is created once per
    class and has the same name. It shares the components and all other state of the given pipeline, which is not
    modified: use the returned one. Nothing is patched, so `isinstance`, `from_pipe`, the `AutoPipeline` classes and
    the rest of diffusers treat the result like the original, and `save_pretrained` writes the same files.

    Args:
        pipe: a diffusers pipeline with a supported `unet`: PAG, LCM, AnimateDiff, a community pipeline.

    Returns:
        An instance of a subclass of the pipeline's class; `pipe` itself if it already has the methods.

    Raises:
        RestuneError: if `pipe` is not a pipeline, or has no supported denoiser.
    """
    if isinstance(pipe, RestuneLoaderMixin):
        return pipe
    if not isinstance(pipe, DiffusionPipeline):
        raise RestuneError(f"Tuners can be enabled on a diffusers pipeline, but this is a {type(pipe).__name__}.")
    enabled = _shared(type(pipe), vars(pipe))
    describe_base(enabled._tuner_base)
    return enabled


class _Enabled(RestuneLoaderMixin):
    """Common base of the generated subclasses."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The generated class cannot be imported, so pickling and copying refer to the original class.
        return _shared, (plain_class(type(self)), vars(self))


@cache
def _enabled_class(pipeline_class: type) -> type:
    # The original's name keeps diffusers' lookups by class name working.
    body = {"__module__": __name__, "__doc__": pipeline_class.__doc__}
    return type(pipeline_class.__name__, (_Enabled, pipeline_class), body)


def _shared(pipeline_class: type, state: dict[str, Any]) -> Any:
    enabled_class: Any = _enabled_class(pipeline_class)
    enabled = enabled_class.__new__(enabled_class)
    vars(enabled).update(state)
    return enabled
