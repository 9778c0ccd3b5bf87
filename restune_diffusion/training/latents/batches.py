"""Put training batches together from the cache and the sample stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..feature_cache.tap_features import TapFeatures
from .cache import Cache
from .noising import Noising
from .sampler import BucketedSampler, Draw, SeededSampler
from .text_conditioning import Conditioning, denoiser_inputs


@dataclass(frozen=True)
class Batch:
    """Input of one forward pass: clean latents, noise, timesteps, and keyword arguments of the denoiser.

    `perturbation` is added to the noise in the denoiser's input, and not to what it shall predict.
    `conditions` has one tensor for each condition of a control tuner, `(samples, channels, height, width)` in [0, 1].
    `mask` is how much each place counts in the loss, `(samples, 1, height, width)`; None where all count the same.
    `inpainting` is what an inpainting base takes beside the noisy latents, `(samples, channels, height, width)`.
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
    """What the base makes of this batch on the way to its output head, where that is known without another pass."""

    def denoiser_sample(self, noisy: torch.Tensor) -> torch.Tensor:
        """Return what the denoiser takes as its sample, in diffusers' order: noisy latents, mask, masked latents."""
        return noisy if self.inpainting is None else torch.cat([noisy, self.inpainting], dim=1)

    @property
    def input_noise(self) -> torch.Tensor:
        """The noise that is in the denoiser's input."""
        return self.noise if self.perturbation is None else self.noise + self.perturbation


class BatchSource(Protocol):
    """Batches by their number."""

    def __getitem__(self, number: int) -> Batch:
        """Return a batch."""


class Batches:
    """Draws batches by their number, so that any of them can be drawn at any time.

    Args:
        cache: the encoded training data.
        seed: seed of the run.
        size: samples of a batch.
        timesteps: number of noise levels.
        caption_dropout: share of the samples that get the empty caption.
        device: where the batches go.
        dtype: dtype of the text states.
        noising: how noise and timesteps are drawn.
        encode: makes the text states of a batch's captions, None being a dropped one, where they are not those of the
            cache.
        step_size: samples of an optimizer step, over all its batches and processes, which are of one size where the
            cache has images of several; those of a batch where not given.
        unmasked_weight: least weight of the loss where the cache has masks.
        inpainting: makes the further channels of an inpainting base from the numbers of a batch's images and the
            generators of its samples.
        stream: which sample is drawn at which position; a stream of all images in random order where not given.

    Raises:
        TrainingError: if the base has no timesteps in the range that is asked for.
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
        stream: SeededSampler | None = None,
    ) -> None:
        self._noising = noising or Noising()
        self._noising.range(timesteps)
        self._cache = cache
        self._shown = cache.shown
        self._stream = stream if stream is not None else self._make_stream(seed, step_size or size)
        self._unmasked_weight = unmasked_weight
        self._size = size
        self._timesteps = timesteps
        self._caption_dropout = caption_dropout
        self._device = device
        self._dtype = dtype
        self._encode = encode if encode is not None else self._cached
        self._inpainting = inpainting

    def __getitem__(self, number: int) -> Batch:
        return self.of(self._stream.draws(number * self._size, self._size))

    def of(self, draws: Iterable[Draw]) -> Batch:
        """Put the batch of these draws together."""
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
            # Drawn last and only if asked, so that what the other draws give does not depend on them.
            if self._noising.offset:
                noise[-1] = noise[-1] + self._noising.offset_for(noise[-1], draw.generator)
            if self._noising.perturbation:
                perturbations.append(self._noising.perturbation_for(noise[-1], draw.generator))
        return Batch(
            torch.stack(latents).to(self._device),
            torch.stack(noise).to(self._device),
            torch.stack(timesteps).to(self._device),
            denoiser_inputs(self._encode(captions), size_conditionings, self._device, self._dtype),
            tuple(torch.stack(each).to(self._device) / 255 for each in zip(*conditions, strict=True)),
            torch.stack(perturbations).to(self._device) if perturbations else None,
            torch.stack(masks).to(self._device) if masks else None,
            self._inpainting_inputs(entries, draws),
        )

    def _make_stream(self, seed: int, step_size: int) -> SeededSampler:
        buckets: dict[tuple[int, ...], list[int]] = {}
        for number, views in enumerate(self._shown):
            buckets.setdefault(tuple(self._cache.latents[views[0]].mean.shape), []).append(number)
        if len(buckets) == 1:
            return SeededSampler(len(self._shown), seed)
        return BucketedSampler([buckets[size] for size in sorted(buckets)], seed, step_size)

    def _entry(self, draw: Draw) -> int:
        """Choose the view of an image."""
        views = self._shown[draw.index]
        return views[int(torch.randint(len(views), (), generator=draw.view))] if len(views) > 1 else views[0]

    def _inpainting_inputs(self, entries: Sequence[int], draws: Sequence[Draw]) -> torch.Tensor | None:
        if self._inpainting is None:
            return None
        return self._inpainting(entries, [draw.generator for draw in draws])

    def _cached(self, captions: Sequence[str | None]) -> list[Conditioning]:
        cache = self._cache
        return [cache.unconditional if caption is None else cache.conditionings[caption] for caption in captions]
