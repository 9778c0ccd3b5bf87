"""Turn an admitted request into the state of its denoising, with the methods of diffusers' own pipelines."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from ...imaging.rgb import to_rgb
from .job import Denoising, Inpainting, Job
from .text_cache import PromptEmbeddings
from .views import PipelineViews

# Defaults of diffusers' XL pipelines that start from an image.
_AESTHETIC_SCORES = (6.0, 2.5)


class Preparation:
    """Latents, timesteps and conditioning of requests, as the pipelines compute them.

    Args:
        views: the pipelines.
    """

    def __init__(self, views: PipelineViews) -> None:
        self._views = views
        self._pipeline = views.pipeline
        unet = views.pipeline.unet.config
        self._distilled_width: int | None = unet.time_cond_proj_dim

    def guided(self, guidance: float) -> bool:
        """Return whether a scale of guidance takes two rows; a distilled U-Net gets the scale as an input instead."""
        return guidance > 1 and self._distilled_width is None

    @torch.no_grad()
    def denoising(self, job: Job, prompt: PromptEmbeddings) -> Denoising:
        """Return the state of a request before its first step.

        Args:
            job: the request.
            prompt: its text embeddings.
        """
        request, scheduler = job.request, job.scheduler
        view = self._views.of(job.task, scheduler)
        generator = torch.Generator("cpu").manual_seed(job.ticket.seed)
        device, dtype = self._views.device, prompt.embeds.dtype
        inpainting = None
        if job.task == "text":
            timesteps = scheduler.timesteps
            channels = self._pipeline.unet.config.in_channels
            latents = view.prepare_latents(1, channels, job.height, job.width, dtype, device, generator, None)
        else:
            timesteps, _ = view.get_timesteps(request.steps, request.strength, device)
            prepare = self._from_image if job.task == "image" else self._from_masked
            latents, inpainting = prepare(view, job, timesteps[:1], dtype, generator)
        # The scale is that of classifier-free guidance or an input of the U-Net, and has no effect otherwise.
        guided = self.guided(request.guidance)
        return Denoising(
            scheduler=scheduler,
            timesteps=timesteps,
            latents=latents,
            embeds=prompt.embeds,
            guidance=request.guidance if guided else None,
            step_options=view.prepare_extra_step_kwargs(generator, 0.0),
            added={} if prompt.pooled is None else self._added(view, job, prompt.pooled),
            timestep_cond=self._guidance_embedding(view, request.guidance, latents),
            inpainting=inpainting,
            takes_mask=self._views.takes_mask,
        )

    def _from_image(
        self, view: Any, job: Job, timestep: torch.Tensor, dtype: torch.dtype, generator: torch.Generator
    ) -> tuple[torch.Tensor, None]:
        image = view.image_processor.preprocess(_rgb(job), height=job.height, width=job.width)
        return view.prepare_latents(image, timestep, 1, 1, dtype, self._views.device, generator), None

    def _from_masked(
        self, view: Any, job: Job, timestep: torch.Tensor, dtype: torch.dtype, generator: torch.Generator
    ) -> tuple[torch.Tensor, Inpainting]:
        device, size = self._views.device, {"height": job.height, "width": job.width}
        image = view.image_processor.preprocess(_rgb(job), **size).to(torch.float32)
        blended = not self._views.takes_mask
        latents, noise, *images = view.prepare_latents(
            1,
            view.vae.config.latent_channels,
            job.height,
            job.width,
            dtype,
            device,
            generator,
            None,
            image=image,
            timestep=timestep,
            is_strength_max=job.request.strength == 1.0,
            return_noise=True,
            return_image_latents=blended,
        )
        mask = view.mask_processor.preprocess(job.request.mask, **size)
        # The masked image is encoded even where it is not used, because that advances the generator.
        mask, masked = view.prepare_mask_latents(
            mask, image * (mask < 0.5), 1, job.height, job.width, dtype, device, generator, False
        )
        return latents, Inpainting(mask, masked, images[0] if blended else None, noise)

    def _guidance_embedding(self, view: Any, guidance: float, latents: torch.Tensor) -> torch.Tensor | None:
        if self._distilled_width is None:
            return None
        scale = torch.tensor([guidance - 1])
        embedding: torch.Tensor = view.get_guidance_scale_embedding(scale, embedding_dim=self._distilled_width)
        return embedding.to(device=latents.device, dtype=latents.dtype)

    def _added(self, view: Any, job: Job, pooled: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the size conditioning and the pooled text embeddings of Stable Diffusion XL."""
        size, corner = (job.height, job.width), (0, 0)
        encoder = view.text_encoder_2
        options = {
            "dtype": pooled.dtype,
            "text_encoder_projection_dim": pooled.shape[-1] if encoder is None else encoder.config.projection_dim,
        }
        if job.task == "text":
            positive = negative = view._get_add_time_ids(size, corner, size, **options)
        else:
            positive, negative = view._get_add_time_ids(
                size, corner, size, *_AESTHETIC_SCORES, size, corner, size, **options
            )
        ids = torch.cat([negative, positive]) if len(pooled) > 1 else positive
        return {"text_embeds": pooled, "time_ids": ids.to(pooled.device)}


def _rgb(job: Job) -> Image.Image:
    assert job.request.image is not None
    return to_rgb(job.request.image)
