"""Diffusers' pipelines with the tuner loader mixed in."""

from diffusers import (
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from .loaders import RestuneLoaderMixin


class RestuneStableDiffusionPipeline(RestuneLoaderMixin, StableDiffusionPipeline):
    """Text-to-image with Stable Diffusion 1.x or 2.x and detachable tuners."""


class RestuneStableDiffusionImg2ImgPipeline(RestuneLoaderMixin, StableDiffusionImg2ImgPipeline):
    """Image-to-image with Stable Diffusion 1.x or 2.x and detachable tuners."""


class RestuneStableDiffusionInpaintPipeline(RestuneLoaderMixin, StableDiffusionInpaintPipeline):
    """Inpainting with Stable Diffusion 1.x or 2.x, with or without a mask input, and detachable tuners."""


class RestuneStableDiffusionControlNetPipeline(RestuneLoaderMixin, StableDiffusionControlNetPipeline):
    """Text-to-image with Stable Diffusion 1.x or 2.x, a ControlNet and detachable tuners."""


class RestuneStableDiffusionXLPipeline(RestuneLoaderMixin, StableDiffusionXLPipeline):
    """Text-to-image with Stable Diffusion XL and detachable tuners."""


class RestuneStableDiffusionXLImg2ImgPipeline(RestuneLoaderMixin, StableDiffusionXLImg2ImgPipeline):
    """Image-to-image with Stable Diffusion XL and detachable tuners."""


class RestuneStableDiffusionXLInpaintPipeline(RestuneLoaderMixin, StableDiffusionXLInpaintPipeline):
    """Inpainting with Stable Diffusion XL, with or without a mask input, and detachable tuners."""


class RestuneStableDiffusionXLControlNetPipeline(RestuneLoaderMixin, StableDiffusionXLControlNetPipeline):
    """Text-to-image with Stable Diffusion XL, a ControlNet and detachable tuners."""
