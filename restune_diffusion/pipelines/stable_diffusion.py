"""Stable Diffusion pipelines of diffusers with `RestuneLoaderMixin`.

At run time the mixin copies the signatures of the extended class. The declarations under `TYPE_CHECKING` do the same
for editors and type checkers, with the parameters of the installed diffusers version.
"""

# ruff: noqa: D102 (the methods declared here have the docstrings of diffusers)

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from .signatures import call_with_tuners, same_as


class RestuneStableDiffusionPipeline(RestuneLoaderMixin, StableDiffusionPipeline):
    """Text-to-image with Stable Diffusion 1.x or 2.x and detachable tuners."""

    if TYPE_CHECKING:

        @call_with_tuners(StableDiffusionPipeline.__call__)
        def __call__(self) -> None: ...

        @same_as(StableDiffusionPipeline.encode_prompt)
        def encode_prompt(self) -> None: ...


class RestuneStableDiffusionImg2ImgPipeline(RestuneLoaderMixin, StableDiffusionImg2ImgPipeline):
    """Image-to-image with Stable Diffusion 1.x or 2.x and detachable tuners."""

    if TYPE_CHECKING:

        @call_with_tuners(StableDiffusionImg2ImgPipeline.__call__)
        def __call__(self) -> None: ...

        @same_as(StableDiffusionImg2ImgPipeline.encode_prompt)
        def encode_prompt(self) -> None: ...


class RestuneStableDiffusionInpaintPipeline(RestuneLoaderMixin, StableDiffusionInpaintPipeline):
    """Inpainting with Stable Diffusion 1.x or 2.x, with or without a mask input, and detachable tuners."""

    if TYPE_CHECKING:

        @call_with_tuners(StableDiffusionInpaintPipeline.__call__)
        def __call__(self) -> None: ...

        @same_as(StableDiffusionInpaintPipeline.encode_prompt)
        def encode_prompt(self) -> None: ...


class RestuneStableDiffusionControlNetPipeline(RestuneLoaderMixin, StableDiffusionControlNetPipeline):
    """Text-to-image with Stable Diffusion 1.x or 2.x, a ControlNet and detachable tuners."""

    if TYPE_CHECKING:

        @call_with_tuners(StableDiffusionControlNetPipeline.__call__)
        def __call__(self) -> None: ...

        @same_as(StableDiffusionControlNetPipeline.encode_prompt)
        def encode_prompt(self) -> None: ...


class RestuneStableDiffusionXLPipeline(RestuneLoaderMixin, StableDiffusionXLPipeline):
    """Text-to-image with Stable Diffusion XL and detachable tuners."""

    if TYPE_CHECKING:

        @call_with_tuners(StableDiffusionXLPipeline.__call__)
        def __call__(self) -> None: ...

        @same_as(StableDiffusionXLPipeline.encode_prompt)
        def encode_prompt(self) -> None: ...


class RestuneStableDiffusionXLImg2ImgPipeline(RestuneLoaderMixin, StableDiffusionXLImg2ImgPipeline):
    """Image-to-image with Stable Diffusion XL and detachable tuners."""

    if TYPE_CHECKING:

        @call_with_tuners(StableDiffusionXLImg2ImgPipeline.__call__)
        def __call__(self) -> None: ...

        @same_as(StableDiffusionXLImg2ImgPipeline.encode_prompt)
        def encode_prompt(self) -> None: ...


class RestuneStableDiffusionXLInpaintPipeline(RestuneLoaderMixin, StableDiffusionXLInpaintPipeline):
    """Inpainting with Stable Diffusion XL, with or without a mask input, and detachable tuners."""

    if TYPE_CHECKING:

        @call_with_tuners(StableDiffusionXLInpaintPipeline.__call__)
        def __call__(self) -> None: ...

        @same_as(StableDiffusionXLInpaintPipeline.encode_prompt)
        def encode_prompt(self) -> None: ...


class RestuneStableDiffusionXLControlNetPipeline(RestuneLoaderMixin, StableDiffusionXLControlNetPipeline):
    """Text-to-image with Stable Diffusion XL, a ControlNet and detachable tuners."""

    if TYPE_CHECKING:

        @call_with_tuners(StableDiffusionXLControlNetPipeline.__call__)
        def __call__(self) -> None: ...

        @same_as(StableDiffusionXLControlNetPipeline.encode_prompt)
        def encode_prompt(self) -> None: ...
