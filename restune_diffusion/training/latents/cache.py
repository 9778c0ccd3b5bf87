"""Everything that the frozen encoders say about the training data, computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...data.image_files import SizeConditioning
from ...data.loss_masks import latent_mask
from ...data.training_images import Sample
from ...utils.errors import NoImageError
from .precision import in_fp32
from .text_conditioning import Conditioning, encode_caption, encode_nothing


@dataclass(frozen=True)
class Latent:
    """Posterior of an image under the base's autoencoder, on the CPU in fp32, already scaled for the denoiser."""

    mean: torch.Tensor
    std: torch.Tensor

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        """Sample the latent."""
        return self.mean + self.std * torch.randn(self.mean.shape, generator=generator)


@dataclass(frozen=True)
class Cache:
    """The encoded training data: one entry per view of an image, one conditioning per distinct caption.

    `conditions` holds for each entry those that steer it, uint8, in the order of the tuner's conditions, `masks` what
    of it to train on, 1 x height x width of the latent, and `pictures` the view itself, uint8, where a base needs it
    in each step; all three may be empty. `views` are the entries of each image: one, unless images are cut or mirrored
    at random. `repeats` says how often an epoch shows each image. `digests` tell each entry, with all that belongs to
    it, from any other.
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
    pictures: list[torch.Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.views)

    def conditioning(self, index: int) -> Conditioning:
        """Return the text states of an entry's caption."""
        return self.conditionings[self.captions[index]]

    @property
    def shown(self) -> list[list[int]]:
        """The views of what an epoch shows, each image as often as it is repeated."""
        return [views for views, repeats in zip(self.views, self.repeats, strict=True) for _ in range(repeats)]

    @property
    def data_hash(self) -> str:
        """What tells this data, in this order, from any other."""
        return hashlib.sha256(b"".join(self.digests)).hexdigest()

    @property
    def bytes(self) -> int:
        """Memory that the cache takes."""
        tensors = [tensor for latent in self.latents for tensor in (latent.mean, latent.std)]
        tensors += [conditioning.states for conditioning in self.conditionings.values()]
        tensors += [condition for conditions in self.conditions for condition in conditions]
        tensors += self.masks + self.pictures
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def build_cache(pipeline: Any, samples: Iterable[Sample], keep_pictures: bool = False) -> Cache:
    """Encode images and captions with the pipeline's frozen encoders.

    Args:
        pipeline: the base.
        samples: the training data.
        keep_pictures: whether the images themselves are needed in training.

    Raises:
        NoImageError: if there is no sample.
    """
    latents, captions, size_conditionings, conditions = [], [], [], []
    masks: list[torch.Tensor] = []
    views: list[list[int]] = []
    repeats: list[int] = []
    digests, pictures = [], []
    with in_fp32(pipeline.vae):
        for sample in samples:
            latents.append(encode_image(pipeline.vae, sample.pixels))
            captions.append(sample.caption)
            size_conditionings.append(sample.size_conditioning)
            conditions.append(sample.conditions)
            if sample.mask is not None:
                masks.append(latent_mask(sample.mask, latents[-1].mean.shape))
            if keep_pictures:
                pictures.append(((sample.pixels + 1) * 127.5).round().to(torch.uint8))
            digests.append(_digest(sample, masks[-1] if sample.mask is not None else None))
            if sample.further:
                views[-1].append(len(latents) - 1)
            else:
                views.append([len(latents) - 1])
                repeats.append(sample.repeats)
    if not latents:
        raise NoImageError("None of the images can be read; check that the files are whole PNG, JPEG or WebP images.")
    conditionings = {caption: encode_caption(pipeline, caption) for caption in dict.fromkeys(captions)}
    nothing = encode_nothing(pipeline)
    return Cache(
        latents,
        captions,
        size_conditionings,
        conditionings,
        nothing,
        digests,
        conditions,
        masks,
        views,
        repeats,
        pictures,
    )


def _digest(sample: Sample, mask: torch.Tensor | None) -> bytes:
    content = hashlib.sha256(sample.digest + sample.caption.encode() + b"\0")
    if mask is not None:
        content.update(mask.numpy().tobytes())
    for condition in sample.conditions:
        content.update(condition.numpy().tobytes())
    return content.digest()


@torch.no_grad()
def encode_image(vae: Any, pixels: torch.Tensor) -> Latent:
    """Encode one image; the posterior is kept, so that every step can draw from it anew."""
    posterior = vae.encode(pixels[None].to(vae.device)).latent_dist
    shift, scale = vae.config.get("shift_factor") or 0.0, vae.config.scaling_factor
    return Latent(((posterior.mean[0] - shift) * scale).cpu(), (posterior.std[0] * scale).cpu())
