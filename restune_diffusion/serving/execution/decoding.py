"""Decode latents to images, as diffusers' pipelines do."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from ..errors import RequestFailed
from .job import Job
from .views import PipelineViews


class Decoder:
    """Decoder of finished latents and of previews.

    Args:
        views: the pipelines.
    """

    def __init__(self, views: PipelineViews) -> None:
        self._pipeline = views.pipeline
        self._is_xl = views.is_xl

    @torch.no_grad()
    def image(self, job: Job) -> tuple[Image.Image, bool]:
        """Return the image of finished latents, and whether the base's safety checker rejects it.

        Raises:
            RequestFailed: if the latents are not finite.
        """
        assert job.state is not None
        latents = job.state.latents
        if not bool(torch.isfinite(latents).all()):
            raise RequestFailed(
                "The latents of this image became NaN or infinite; use smaller weights, less guidance, or another "
                "scheduler."
            )
        return self._decoded(latents)

    @torch.no_grad()
    def preview(self, latents: torch.Tensor) -> Image.Image | None:
        """Return the image of latents in the middle of denoising; None if they are not finite or it is rejected."""
        if not bool(torch.isfinite(latents).all()):
            return None
        image, flagged = self._decoded(latents)
        return None if flagged else image

    def _decoded(self, latents: torch.Tensor) -> tuple[Image.Image, bool]:
        pipeline = self._pipeline
        pixels, flagged = self._pixels_xl(latents) if self._is_xl else self._pixels(latents)
        images: list[Image.Image] = pipeline.image_processor.postprocess(
            pixels, output_type="pil", do_denormalize=[not flagged]
        )
        return images[0], flagged

    def _pixels(self, latents: torch.Tensor) -> tuple[Any, bool]:
        pipeline = self._pipeline
        pixels = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
        pixels, rejected = pipeline.run_safety_checker(pixels, latents.device, latents.dtype)
        return pixels, bool(rejected is not None and rejected[0])

    def _pixels_xl(self, latents: torch.Tensor) -> tuple[torch.Tensor, bool]:
        pipeline, vae = self._pipeline, self._pipeline.vae
        # The decoder of XL overflows in fp16.
        upcast = vae.dtype == torch.float16 and vae.config.force_upcast
        if upcast:
            vae.to(torch.float32)
        latents = latents.to(vae.dtype)
        mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
        if mean is not None and std is not None:
            mean, std = (torch.tensor(each).view(1, -1, 1, 1).to(latents) for each in (mean, std))
            latents = latents * std / vae.config.scaling_factor + mean
        else:
            latents = latents / vae.config.scaling_factor
        pixels: torch.Tensor = vae.decode(latents, return_dict=False)[0]
        if upcast:
            vae.to(torch.float16)
        watermark = getattr(pipeline, "watermark", None)
        return (pixels if watermark is None else watermark.apply_watermark(pixels)), False
