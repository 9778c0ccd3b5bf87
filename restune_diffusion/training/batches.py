"""Put training batches together from the cache and the sample stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .cache import Cache
from .conditioning import Conditioning, denoiser_inputs
from .noising import Noising
from .stream import Draw, SampleStream
from .tap_features import TapFeatures


@dataclass(frozen=True)
class Batch:
    """Input of one forward pass: clean latents, noise, timesteps, and keyword arguments of the denoiser.

    `perturbation` is added to the noise in the denoiser's input, and not to what it shall predict.
    `conditions` has one tensor for each condition of a control tuner, `(samples, channels, height, width)` in [0, 1].
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    inputs: dict[str, Any]
    conditions: tuple[torch.Tensor, ...] = ()
    perturbation: torch.Tensor | None = None
    features: TapFeatures | None = None
    """What the base makes of this batch on the way to its output head, where that is known without another pass."""

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
        stream: SampleStream | None = None,
    ) -> None:
        self._noising = noising or Noising()
        self._noising.range(timesteps)
        self._cache = cache
        self._stream = stream if stream is not None else SampleStream(len(cache), seed)
        self._size = size
        self._timesteps = timesteps
        self._caption_dropout = caption_dropout
        self._device = device
        self._dtype = dtype
        self._encode = encode if encode is not None else self._cached

    def __getitem__(self, number: int) -> Batch:
        return self.of(self._stream.draws(number * self._size, self._size))

    def of(self, draws: Iterable[Draw]) -> Batch:
        """Put the batch of these draws together."""
        latents, noise, timesteps, captions, geometries, conditions = [], [], [], [], [], []
        perturbations = []
        for draw in draws:
            latent = self._cache.latents[draw.index].draw(draw.generator)
            latents.append(latent)
            noise.append(torch.randn(latent.shape, generator=draw.generator))
            timesteps.append(self._noising.timestep(self._timesteps, draw.generator))
            dropped = torch.rand((), generator=draw.generator).item() < self._caption_dropout
            captions.append(None if dropped else self._cache.captions[draw.index])
            geometries.append(self._cache.geometries[draw.index])
            conditions.append(self._cache.conditions[draw.index] if self._cache.conditions else ())
            # Drawn last and only if asked, so that what the other draws give does not depend on them.
            if self._noising.offset:
                noise[-1] = noise[-1] + self._noising.offset_for(noise[-1], draw.generator)
            if self._noising.perturbation:
                perturbations.append(self._noising.perturbation_for(noise[-1], draw.generator))
        return Batch(
            torch.stack(latents).to(self._device),
            torch.stack(noise).to(self._device),
            torch.stack(timesteps).to(self._device),
            denoiser_inputs(self._encode(captions), geometries, self._device, self._dtype),
            tuple(torch.stack(each).to(self._device) / 255 for each in zip(*conditions, strict=True)),
            torch.stack(perturbations).to(self._device) if perturbations else None,
        )

    def _cached(self, captions: Sequence[str | None]) -> list[Conditioning]:
        cache = self._cache
        return [cache.unconditional if caption is None else cache.conditionings[caption] for caption in captions]
