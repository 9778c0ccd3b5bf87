"""Diffusers pipelines with `RestuneLoaderMixin`; `enable_restune` adds the same methods to any other pipeline."""

from typing import TYPE_CHECKING

from ..utils.lazy_names import lazy_names

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

# Modules of this package load without diffusers' pipeline classes.
__getattr__ = lazy_names(__name__, {"stable_diffusion": __all__})
