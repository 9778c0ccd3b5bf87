"""Cache of VAE latents and text embeddings, computed once before training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch

from ...data.image_files import SizeConditioning
from ...data.loss_masks import latent_mask
from ...data.training_images import Sample
from ...utils.display import printable
from ...utils.errors import NoImageError, TrainingError
from .precision import encoding_precision
from .text_conditioning import Conditioning, encode_caption, encode_empty_caption


@dataclass(frozen=True)
class Latent:
    """Posterior of an image under the base's VAE, on the CPU in fp32, scaled for the denoiser."""

    mean: torch.Tensor
    std: torch.Tensor

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        """Return a sample of the latent."""
        return self.mean + self.std * torch.randn(self.mean.shape, generator=generator)


@dataclass(frozen=True)
class Cache:
    """Encoded training data: one entry per view of an image, one text conditioning per distinct caption.

    Some fields may be empty. `conditions` holds the condition images of each entry, uint8, in the tuner's order of
    conditions. `masks` holds the loss mask of each entry, 1 x height x width of the latent. `images` holds the pixels
    of each entry, uint8, 3 x height x width, if the base needs them in each step. `variants` holds the captions that
    each entry is trained with, all with the same probability; without them it is `captions`, one for each entry.

    `views` are the indices of each image's entries: one, unless images are cropped or flipped at random. `repeats` is
    how many times an epoch contains each image. `digests` are the hashes of the entries with all their fields.
    """

    latents: list[Latent]
    captions: list[str]
    size_conditionings: list[SizeConditioning]
    conditionings: dict[str, Conditioning]
    unconditional: Conditioning
    digests: list[bytes]
    conditions: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    masks: list[torch.Tensor] = field(default_factory=list)
    views: list[list[int]] = field(default_factory=list)
    repeats: list[int] = field(default_factory=list)
    images: list[torch.Tensor] = field(default_factory=list)
    variants: list[tuple[str, ...]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.views)

    def caption(self, index: int, number: int) -> str:
        """Return the caption of an entry that a large random number selects."""
        variants = self.variants[index] if self.variants else (self.captions[index],)
        return variants[number % len(variants)]

    def conditioning(self, index: int) -> Conditioning:
        """Return the text embeddings of an entry's caption."""
        return self.conditionings[self.captions[index]]

    @property
    def shown(self) -> list[list[int]]:
        """Views of the images of an epoch, with each image as many times as it is repeated."""
        return [views for views, repeats in zip(self.views, self.repeats, strict=True) for _ in range(repeats)]

    @property
    def data_hash(self) -> str:
        """SHA-256 of the data, including its order."""
        return hashlib.sha256(b"".join(self.digests)).hexdigest()

    @property
    def bytes(self) -> int:
        """Size of the cache in bytes."""
        tensors = [tensor for latent in self.latents for tensor in (latent.mean, latent.std)]
        tensors += [condition for conditions in self.conditions for condition in conditions]
        tensors += self.masks + self.images
        return _bytes_of(tensors) + self.text_bytes

    @property
    def text_bytes(self) -> int:
        """Size of the text embeddings in bytes."""
        return _bytes_of(conditioning.states for conditioning in self.conditionings.values())


def build_cache(pipeline: Any, samples: Iterable[Sample], keep_images: bool = False) -> Cache:
    """Encode images and captions with the pipeline's frozen encoders.

    Args:
        pipeline: the base.
        samples: the training data.
        keep_images: whether training needs the pixels of the images.

    Raises:
        NoImageError: if there are no samples.
    """
    latents, captions, size_conditionings, conditions = [], [], [], []
    masks: list[torch.Tensor] = []
    views: list[list[int]] = []
    repeats: list[int] = []
    digests, images, variants = [], [], []
    with encoding_precision(pipeline.vae):
        for sample in samples:
            latents.append(encode_image(pipeline.vae, sample.pixels))
            _check_finite(latents[-1], sample.name)
            captions.append(sample.caption)
            variants.append(sample.texts)
            size_conditionings.append(sample.size_conditioning)
            conditions.append(sample.conditions)
            if sample.mask is not None:
                masks.append(latent_mask(sample.mask, latents[-1].mean.shape))
            if keep_images:
                images.append(((sample.pixels + 1) * 127.5).round().to(torch.uint8))
            digests.append(_digest(sample, masks[-1] if sample.mask is not None else None))
            if sample.further:
                views[-1].append(len(latents) - 1)
            else:
                views.append([len(latents) - 1])
                repeats.append(sample.repeats)
    if not latents:
        raise NoImageError(
            "None of the images can be read; check that the files are complete PNG, JPEG or WebP images."
        )
    conditionings = {caption: encode_caption(pipeline, caption) for caption in dict.fromkeys(chain(*variants))}
    unconditional = encode_empty_caption(pipeline)
    return Cache(
        latents,
        captions,
        size_conditionings,
        conditionings,
        unconditional,
        digests,
        conditions,
        masks,
        views,
        repeats,
        images,
        variants,
    )


def _bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _check_finite(latent: Latent, name: str) -> None:
    if not (latent.mean.isfinite().all() and latent.std.isfinite().all()):
        raise TrainingError(
            f"The autoencoder (VAE) of the base gives NaN or infinite latents for the image {printable(name)}; its "
            f"weights are damaged, do not fit the base, or overflow in fp16. Use another VAE with --vae."
        )


def _digest(sample: Sample, mask: torch.Tensor | None) -> bytes:
    content = hashlib.sha256(sample.digest + sample.caption.encode() + b"\0")
    if len({*sample.texts}) > 1:
        content.update("\0".join(sample.texts).encode() + b"\0")
    if mask is not None:
        content.update(mask.numpy().tobytes())
    for condition in sample.conditions:
        content.update(condition.numpy().tobytes())
    return content.digest()


@torch.no_grad()
def encode_image(vae: Any, pixels: torch.Tensor) -> Latent:
    """Return the VAE posterior of one image; every training step samples a new latent from it.

    Args:
        vae: the base's VAE.
        pixels: the image, `(3, height, width)` in [-1, 1].
    """
    posterior = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist
    shift, scale = vae.config.get("shift_factor") or 0.0, vae.config.scaling_factor
    return Latent(((posterior.mean[0].float() - shift) * scale).cpu(), (posterior.std[0].float() * scale).cpu())
