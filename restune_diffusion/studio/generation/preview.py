"""Small images of the latents while they are denoised."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from PIL import Image

_MOST_ROWS = 9
_LARGEST_LATENT = 32
# A preview may take this part of the time of the denoising.
_SHARE = 0.1
_SHORTEST_PAUSE = 0.4


class Preview:
    """Previews of one generation: at most one every few steps, so that they take a tenth of the time.

    Args:
        pipeline: pipeline whose autoencoder decodes them.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._next = time.monotonic() + _SHORTEST_PAUSE

    def due(self) -> bool:
        """Return whether it is time for another preview."""
        return time.monotonic() >= self._next

    def image(self, latents: torch.Tensor) -> Image.Image | None:
        """Return the images of the latents of a batch side by side; None if they are not finite.

        Args:
            latents: latents, images x channels x height x width.
        """
        begin = time.monotonic()
        image = decoded_preview(self._pipeline, latents)
        now = time.monotonic()
        self._next = now + max(_SHORTEST_PAUSE, (now - begin) / _SHARE)
        return image


@torch.no_grad()
def decoded_preview(pipeline: Any, latents: torch.Tensor) -> Image.Image | None:
    """Decode latents at a reduced size; several images are tiled. The latents are not changed."""
    latents = latents[:_MOST_ROWS]
    if not bool(torch.isfinite(latents).all()):
        return None
    vae = pipeline.vae
    scale = min(1, _LARGEST_LATENT / max(latents.shape[2:]))
    size = max(1, round(latents.shape[2] * scale)), max(1, round(latents.shape[3] * scale))
    # The decoder of XL overflows in fp16.
    upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    try:
        small = torch.nn.functional.adaptive_avg_pool2d(latents.to(vae.dtype), size)
        pixels = vae.decode(_unscaled(small, vae.config), return_dict=False)[0]
    finally:
        if upcast:
            vae.to(torch.float16)
    if hasattr(pipeline, "run_safety_checker"):
        pixels, _ = pipeline.run_safety_checker(pixels, pixels.device, pixels.dtype)
    return tiled(pipeline.image_processor.postprocess(pixels, output_type="pil"))


def tiled(images: list[Image.Image]) -> Image.Image:
    """Return images of one size in rows of about equal number."""
    if len(images) == 1:
        return images[0]
    columns = math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    for number, image in enumerate(images):
        sheet.paste(image, (number % columns * width, number // columns * height))
    return sheet


def _unscaled(latents: torch.Tensor, config: Any) -> torch.Tensor:
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return latents / config.scaling_factor
    mean, std = (torch.tensor(each).view(1, -1, 1, 1).to(latents) for each in (mean, std))
    return latents * std / config.scaling_factor + mean
