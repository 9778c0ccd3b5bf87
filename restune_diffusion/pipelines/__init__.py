"""Diffusers pipelines with `RestuneLoaderMixin`; `enable_restune` adds the same methods to any other pipeline."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .stable_diffusion import (
        RestuneStableDiffusionControlNetPipeline,
        RestuneStableDiffusionImg2ImgPipeline,
        RestuneStableDiffusionInpaintPipeline,
        RestuneStableDiffusionPipeline,
        RestuneStableDiffusionXLControlNetPipeline,
        RestuneStableDiffusionXLImg2ImgPipeline,
        RestuneStableDiffusionXLInpaintPipeline,
        RestuneStableDiffusionXLPipeline,
    )

__all__ = [
    "RestuneStableDiffusionControlNetPipeline",
    "RestuneStableDiffusionImg2ImgPipeline",
    "RestuneStableDiffusionInpaintPipeline",
    "RestuneStableDiffusionPipeline",
    "RestuneStableDiffusionXLControlNetPipeline",
    "RestuneStableDiffusionXLImg2ImgPipeline",
    "RestuneStableDiffusionXLInpaintPipeline",
    "RestuneStableDiffusionXLPipeline",
]


def __getattr__(name: str) -> Any:
    # Lazy, so that importing other modules of this package does not import diffusers.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".stable_diffusion", __name__), name)
