"""Give any diffusers pipeline with a U-Net the tuner loader's methods."""

from __future__ import annotations

from functools import cache
from typing import Any

from diffusers import DiffusionPipeline

from ..backbones import describe_base
from ..utils.errors import RestuneError
from .loaders import RestuneLoaderMixin
from .saving import plain_class


def enable_restune(pipe: DiffusionPipeline) -> Any:
    """Return the pipeline with `load_tuner_weights`, `set_tuners` and the other methods of `RestuneLoaderMixin`.

    The result is an instance of a subclass that mixes the loader into the pipeline's own class; the subclass is made
    once for each class and has its name. It shares the components and all other state of the pipeline that was
    given, which itself stays as it is: go on with the returned one. Nothing is patched, so `isinstance`,
    `from_pipe`, the `AutoPipeline` classes and the rest of diffusers treat the result like the original, and
    `save_pretrained` writes the same files.

    Args:
        pipe: any diffusers pipeline whose `unet` tuners can attach to: PAG, LCM, AnimateDiff, a community pipeline.

    Returns:
        A pipeline of the given one's class; the given one, if it has the methods already.

    Raises:
        RestuneError: if this is no pipeline, or has no denoiser that tuners can attach to.
    """
    if isinstance(pipe, RestuneLoaderMixin):
        return pipe
    if not isinstance(pipe, DiffusionPipeline):
        raise RestuneError(f"Tuners can be enabled on a diffusers pipeline, but this is a {type(pipe).__name__}.")
    enabled = _shared(type(pipe), vars(pipe))
    describe_base(enabled._tuner_base)
    return enabled


class _Enabled(RestuneLoaderMixin):
    """What all classes made here have in common."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The made class cannot be imported, so a pickle and a copy name the class that it was made from.
        return _shared, (plain_class(type(self)), vars(self))


@cache
def _enabled_class(pipeline_class: type) -> type:
    # With the original's name, whatever diffusers looks up by a pipeline's class name is found.
    body = {"__module__": __name__, "__doc__": pipeline_class.__doc__}
    return type(pipeline_class.__name__, (_Enabled, pipeline_class), body)


def _shared(pipeline_class: type, state: dict[str, Any]) -> Any:
    enabled_class: Any = _enabled_class(pipeline_class)
    enabled = enabled_class.__new__(enabled_class)
    vars(enabled).update(state)
    return enabled
