"""Diffusers' pipelines with the tuner loader mixed in."""

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from .loaders import RestuneLoaderMixin


class RestuneStableDiffusionPipeline(RestuneLoaderMixin, StableDiffusionPipeline):
    """Text-to-image with Stable Diffusion 1.x or 2.x and detachable tuners."""


class RestuneStableDiffusionXLPipeline(RestuneLoaderMixin, StableDiffusionXLPipeline):
    """Text-to-image with Stable Diffusion XL and detachable tuners."""
