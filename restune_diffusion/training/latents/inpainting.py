"""Extra input channels of an inpainting base: a mask, and the latent of the masked image.

Every step generates random masks and encodes the masked images, instead of caching a few masks per image. So no mask
repeats, and the inputs of a step depend only on its number. The cost is one forward pass of the VAE encoder per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .precision import encoding_precision

WHOLE = 0.25
"""Fraction of the masks that cover the whole image, as in the training of Stable Diffusion's inpainting checkpoints
(model card of runwayml/stable-diffusion-inpainting: "in 25% mask everything")."""
_SMALLEST = 0.1
"""Minimum side of the other masks, as a fraction of the image's side."""


def draw_mask(height: int, width: int, generator: torch.Generator, whole: float = WHOLE) -> torch.Tensor:
    """Return a random mask, `1 x height x width`, fp32: 1 where the base inpaints, else 0.

    With probability `whole` it covers the whole image. Otherwise it is a rectangle or an ellipse of random size and
    position, as in the inpainting scripts of diffusers.
    """
    shape, *random = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
    if shape < whole:
        return torch.ones(1, height, width)
    sides = [max(1, round(length * (_SMALLEST + (1 - _SMALLEST) * share))) for length, share in
             zip((height, width), random[:2], strict=True)]  # fmt: skip
    corner = [round((length - side) * share) for length, side, share in
              zip((height, width), sides, random[2:], strict=True)]  # fmt: skip
    rows, columns = torch.arange(height)[:, None] - corner[0], torch.arange(width)[None] - corner[1]
    inside = (rows >= 0) & (rows < sides[0]) & (columns >= 0) & (columns < sides[1])
    if shape >= (1 + whole) / 2:
        # A pixel is inside if its center is.
        y, x = (rows + 0.5) / sides[0] * 2 - 1, (columns + 0.5) / sides[1] * 2 - 1
        inside &= y**2 + x**2 <= 1
    return inside[None].float()


class InpaintingInputs:
    """Compute the extra input channels of an inpainting base for a batch.

    Args:
        vae: the base's VAE, or its copy for encoding, on the training device.
        images: the training images, uint8, each 3 x height x width.
    """

    def __init__(self, vae: Any, images: Sequence[torch.Tensor]) -> None:
        self._vae = vae
        self._images = images

    def __call__(self, indices: Sequence[int], generators: Sequence[torch.Generator]) -> torch.Tensor:
        """Return mask and masked latent, `(samples, 1 + latent channels, height, width)`, fp32, on the device.

        Args:
            indices: index of each sample's image.
            generators: random generator of each sample, for its mask and for sampling the posterior.
        """
        images = [to_pixels(self._images[index]) for index in indices]
        masks = [draw_mask(image.shape[1], image.shape[2], generator) for image, generator in
                 zip(images, generators, strict=True)]  # fmt: skip
        masked = torch.stack([hide(image, mask) for image, mask in zip(images, masks, strict=True)])
        latents = self._encode(masked, generators)
        # Nearest-neighbor interpolation, as in diffusers' inpainting pipelines.
        small = F.interpolate(torch.stack(masks), size=latents.shape[-2:]).to(latents.device)
        return torch.cat([small, latents], dim=1)

    @torch.no_grad()
    def _encode(self, pixels: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
        with encoding_precision(self._vae):
            posterior = self._vae.encode(pixels.to(self._vae.device, self._vae.dtype)).latent_dist
        noise = torch.stack([torch.randn(posterior.mean.shape[1:], generator=each) for each in generators])
        latents = posterior.mean.float() + posterior.std.float() * noise.to(posterior.mean.device)
        # No shift_factor, because the pipelines do not apply it to masked latents.
        return latents * self._vae.config.scaling_factor


def to_pixels(image: torch.Tensor) -> torch.Tensor:
    """Convert an image from uint8 to fp32 in [-1, 1]."""
    return image.float() / 127.5 - 1


def hide(pixels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Fill the masked area with mid-gray, 0 in [-1, 1]."""
    return pixels * (mask < 0.5)


def validation_inputs(images: Sequence[torch.Tensor], prompts: int, seed: int) -> list[dict[str, Image.Image]]:
    """Return the inputs of an inpainting pipeline for each prompt: `image`, a training image, and `mask_image`.

    The masks never cover the whole image, and depend only on the seed. The list is empty if there are no images.
    """
    if not images:
        return []
    inputs = []
    for number in range(prompts):
        image = images[number % len(images)]
        generator = torch.Generator().manual_seed(seed + number)
        mask = draw_mask(image.shape[1], image.shape[2], generator, whole=0.0)
        inputs.append({"image": _to_pil(image), "mask_image": _to_pil(mask.mul(255).to(torch.uint8))})
    return inputs


def masked_image(image: Image.Image, mask_image: Image.Image) -> Image.Image:
    """Return the image with the masked area in gray."""
    return Image.composite(Image.new("RGB", image.size, (128, 128, 128)), image, mask_image)


def _to_pil(pixels: torch.Tensor) -> Image.Image:
    values = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(values.squeeze(-1) if values.shape[-1] == 1 else values))
