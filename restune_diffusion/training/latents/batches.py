"""Assemble training batches from the latent cache and the sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ...data.image_files import SizeConditioning
from ..feature_cache.tap_features import TapFeatures
from ..transfers.to_device import to_device
from .cache import Cache
from .noising import Noising
from .sampler import BucketedSampler, Draw, SeededSampler
from .text_conditioning import Conditioning, denoiser_inputs


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass: clean latents, noise, timesteps, and keyword arguments of the denoiser.

    `perturbation` is added to the noise in the denoiser's input, but not to the target.
    `conditions` has one tensor for each condition of a control tuner, `(samples, channels, height, width)` in [0, 1].
    `mask` weights the loss by position, `(samples, 1, height, width)`; None for uniform weights.
    `inpainting` holds the extra input channels of an inpainting base, `(samples, channels, height, width)`.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    inputs: dict[str, Any]
    conditions: tuple[torch.Tensor, ...] = ()
    perturbation: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    inpainting: torch.Tensor | None = None
    features: TapFeatures | None = None
    """Features of the base for this batch, if they are known without another forward pass."""
    teacher_inputs: dict[str, Any] | None = None
    """Keyword arguments of the denoiser for the teacher of a distillation, if its text embeddings are other ones."""

    def denoiser_sample(self, noisy: torch.Tensor) -> torch.Tensor:
        """Return the denoiser's `sample`, with channels in diffusers' order: noisy latents, mask, masked latents."""
        return noisy if self.inpainting is None else torch.cat([noisy, self.inpainting], dim=1)

    @property
    def input_noise(self) -> torch.Tensor:
        """Noise in the denoiser's input."""
        return self.noise if self.perturbation is None else self.noise + self.perturbation


class BatchSource(Protocol):
    """Source of batches by number."""

    def __getitem__(self, number: int) -> Batch:
        """Return the batch with a number."""


class Batches:
    """Training batches by number, in any order.

    Args:
        cache: the encoded training data.
        seed: seed of the run.
        size: samples per batch.
        timesteps: number of timesteps of the base.
        caption_dropout: fraction of the samples that get the empty caption.
        device: device of the batches.
        dtype: dtype of the text embeddings.
        noising: distributions of noise and timesteps.
        encode: encodes the captions of a batch, None for a dropped one; by default their embeddings are cached.
        step_size: samples per optimizer step, over all batches and processes; by default the samples of a batch. If
            the cache has several image sizes, all samples of a step have the same size.
        unmasked_weight: minimum weight of the loss if the cache has masks.
        inpainting: computes the extra channels of an inpainting base from the indices of a batch's images and the
            generators of its samples.
        sampler: sample at each position; by default all images in random order.
        teacher: text embeddings of the teacher of a distillation by caption, None for a dropped one.

    Raises:
        TrainingError: if the range of timesteps is invalid for the base.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        seed: int,
        size: int,
        timesteps: int,
        caption_dropout: float,
        device: torch.device,
        dtype: torch.dtype,
        noising: Noising | None = None,
        encode: Callable[[Sequence[str | None]], Sequence[Conditioning]] | None = None,
        step_size: int | None = None,
        unmasked_weight: float = 0.0,
        inpainting: Callable[[Sequence[int], Sequence[torch.Generator]], torch.Tensor] | None = None,
        sampler: SeededSampler | None = None,
        teacher: Mapping[str | None, Conditioning] | None = None,
    ) -> None:
        self._noising = noising or Noising()
        self._noising.range(timesteps)
        self._cache = cache
        self._shown = cache.shown
        self._sampler = sampler if sampler is not None else self._make_sampler(seed, step_size or size)
        self._unmasked_weight = unmasked_weight
        self._size = size
        self._timesteps = timesteps
        self._caption_dropout = caption_dropout
        self._device = device
        self._dtype = dtype
        self._encode = encode if encode is not None else self._cached
        self._inpainting = inpainting
        self._teacher = teacher

    def __getitem__(self, number: int) -> Batch:
        return self.of(self._sampler.draws(number * self._size, self._size))

    def of(self, draws: Iterable[Draw]) -> Batch:
        """Return the batch of these draws."""
        draws = list(draws)
        latents, noise, timesteps, captions, size_conditionings, conditions = [], [], [], [], [], []
        perturbations, masks = [], []
        entries = [self._entry(draw) for draw in draws]
        for draw, entry in zip(draws, entries, strict=True):
            latent = self._cache.latents[entry].draw(draw.generator)
            latents.append(latent)
            noise.append(torch.randn(latent.shape, generator=draw.generator))
            timesteps.append(self._noising.timestep(self._timesteps, draw.generator))
            dropped = torch.rand((), generator=draw.generator).item() < self._caption_dropout
            captions.append(None if dropped else self._cache.captions[entry])
            size_conditionings.append(self._cache.size_conditionings[entry])
            conditions.append(self._cache.conditions[entry] if self._cache.conditions else ())
            masks += [self._cache.masks[entry].clamp(min=self._unmasked_weight)] if self._cache.masks else []
            # Optional noise comes last, so that it does not change the other random numbers.
            if self._noising.offset:
                noise[-1] = noise[-1] + self._noising.offset_for(noise[-1], draw.generator)
            if self._noising.perturbation:
                perturbations.append(self._noising.perturbation_for(noise[-1], draw.generator))
        return Batch(
            to_device(torch.stack(latents), self._device),
            to_device(torch.stack(noise), self._device),
            to_device(torch.stack(timesteps), self._device),
            denoiser_inputs(self._encode(captions), size_conditionings, self._device, self._dtype),
            tuple(to_device(torch.stack(each), self._device) / 255 for each in zip(*conditions, strict=True)),
            to_device(torch.stack(perturbations), self._device) if perturbations else None,
            to_device(torch.stack(masks), self._device) if masks else None,
            self._inpainting_inputs(entries, draws),
            teacher_inputs=self._teacher_inputs(captions, size_conditionings),
        )

    def _make_sampler(self, seed: int, step_size: int) -> SeededSampler:
        buckets: dict[tuple[int, ...], list[int]] = {}
        for number, views in enumerate(self._shown):
            buckets.setdefault(tuple(self._cache.latents[views[0]].mean.shape), []).append(number)
        if len(buckets) == 1:
            return SeededSampler(len(self._shown), seed)
        return BucketedSampler([buckets[size] for size in sorted(buckets)], seed, step_size)

    def _entry(self, draw: Draw) -> int:
        """Choose a view of an image."""
        views = self._shown[draw.index]
        return views[int(torch.randint(len(views), (), generator=draw.view))] if len(views) > 1 else views[0]

    def _inpainting_inputs(self, entries: Sequence[int], draws: Sequence[Draw]) -> torch.Tensor | None:
        if self._inpainting is None:
            return None
        return self._inpainting(entries, [draw.generator for draw in draws])

    def _teacher_inputs(
        self, captions: Sequence[str | None], sizes: Sequence[SizeConditioning]
    ) -> dict[str, Any] | None:
        if self._teacher is None:
            return None
        return denoiser_inputs([self._teacher[caption] for caption in captions], sizes, self._device, self._dtype)

    def _cached(self, captions: Sequence[str | None]) -> list[Conditioning]:
        cache = self._cache
        return [cache.unconditional if caption is None else cache.conditionings[caption] for caption in captions]
