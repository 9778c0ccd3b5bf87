"""What an inpainting base sees beside the noisy latent: a mask, and the latent of the picture without what it hides.

Each step draws its masks anew and encodes the masked pictures with them, instead of a few masks for each picture from
a cache: a tuner sees no mask twice, and what a step sees follows from its number alone. The price is one pass of the
autoencoder's encoder in a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .precision import in_fp32

WHOLE = 0.25
"""Share of the masks that hide everything, as in the training of Stable Diffusion's inpainting checkpoints (model card
of runwayml/stable-diffusion-inpainting: "in 25% mask everything")."""
_SMALLEST = 0.1
"""Shortest side of the other masks, in sides of the picture."""


def draw_mask(height: int, width: int, generator: torch.Generator, whole: float = WHOLE) -> torch.Tensor:
    """Draw a mask, `1 x height x width`, fp32: 1 where the base shall paint, else 0.

    It is the whole picture in the share `whole` of the cases, and else a rectangle or an ellipse of any size at any
    place, as in the inpainting scripts of diffusers.
    """
    kind, *random = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
    if kind < whole:
        return torch.ones(1, height, width)
    sides = [max(1, round(length * (_SMALLEST + (1 - _SMALLEST) * share))) for length, share in
             zip((height, width), random[:2], strict=True)]  # fmt: skip
    corner = [round((length - side) * share) for length, side, share in
              zip((height, width), sides, random[2:], strict=True)]  # fmt: skip
    rows, columns = torch.arange(height)[:, None] - corner[0], torch.arange(width)[None] - corner[1]
    inside = (rows >= 0) & (rows < sides[0]) & (columns >= 0) & (columns < sides[1])
    if kind >= (1 + whole) / 2:
        # The middle of a pixel decides.
        y, x = (rows + 0.5) / sides[0] * 2 - 1, (columns + 0.5) / sides[1] * 2 - 1
        inside &= y**2 + x**2 <= 1
    return inside[None].float()


class InpaintingInputs:
    """Makes the further channels of an inpainting base for a batch.

    Args:
        vae: the base's autoencoder, on the device of the training.
        pictures: the training images, uint8, each 3 x height x width.
    """

    def __init__(self, vae: Any, pictures: Sequence[torch.Tensor]) -> None:
        self._vae = vae
        self._pictures = pictures

    def __call__(self, indices: Sequence[int], generators: Sequence[torch.Generator]) -> torch.Tensor:
        """Return mask and masked latent, `(samples, 1 + latent channels, height, width)`, fp32, on the device.

        Args:
            indices: number of the picture of each sample.
            generators: source of each sample's mask, and of the draw from the posterior.
        """
        pictures = [to_pixels(self._pictures[index]) for index in indices]
        masks = [draw_mask(picture.shape[1], picture.shape[2], generator) for picture, generator in
                 zip(pictures, generators, strict=True)]  # fmt: skip
        hidden = torch.stack([hide(picture, mask) for picture, mask in zip(pictures, masks, strict=True)])
        latents = self._encode(hidden, generators)
        # The nearest value, as in diffusers' inpainting pipelines.
        small = F.interpolate(torch.stack(masks), size=latents.shape[-2:]).to(latents.device)
        return torch.cat([small, latents], dim=1)

    @torch.no_grad()
    def _encode(self, pixels: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
        with in_fp32(self._vae):
            posterior = self._vae.encode(pixels.to(self._vae.device)).latent_dist
        noise = torch.stack([torch.randn(posterior.mean.shape[1:], generator=each) for each in generators])
        latents = posterior.mean + posterior.std * noise.to(posterior.mean.device)
        # Not shifted either, where an autoencoder has such a factor: the pipelines do not.
        return latents * self._vae.config.scaling_factor


def to_pixels(picture: torch.Tensor) -> torch.Tensor:
    """Bring a picture from uint8 to [-1, 1]."""
    return picture.float() / 127.5 - 1


def hide(pixels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Paint what a mask hides in the middle grey, 0 in [-1, 1]."""
    return pixels * (mask < 0.5)


def validation_inputs(pictures: Sequence[torch.Tensor], prompts: int, seed: int) -> list[dict[str, Image.Image]]:
    """Return what an inpainting pipeline repaints for each prompt: `image`, a training picture, and `mask_image`.

    The masks hide a part and never everything, and are the same each time. Without pictures there is nothing.
    """
    if not pictures:
        return []
    inputs = []
    for number in range(prompts):
        picture = pictures[number % len(pictures)]
        generator = torch.Generator().manual_seed(seed + number)
        mask = draw_mask(picture.shape[1], picture.shape[2], generator, whole=0.0)
        inputs.append({"image": _image(picture), "mask_image": _image(mask.mul(255).to(torch.uint8))})
    return inputs


def masked_picture(image: Image.Image, mask_image: Image.Image) -> Image.Image:
    """Paint what the mask hides in grey."""
    return Image.composite(Image.new("RGB", image.size, (128, 128, 128)), image, mask_image)


def _image(pixels: torch.Tensor) -> Image.Image:
    values = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(values.squeeze(-1) if values.shape[-1] == 1 else values))
