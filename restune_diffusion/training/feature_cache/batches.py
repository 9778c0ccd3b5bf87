"""Training batches with features from the feature cache, read in a thread during the previous step."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from ...utils.seeds import derived_seed, seeded
from ..latents.batches import Batch, BatchSource
from ..latents.sampler import Draw, SeededSampler
from .cache import FeatureCache


class CachedFeatureSampler(SeededSampler):
    """Sampler that repeats a fixed number of draws (noise and timestep) of each image, one after another by epoch.

    The draws of an image are independent of each other, so their order does not matter.

    Args:
        length: number of images.
        seed: seed of the run.
        count: draws per image.
    """

    def __init__(self, length: int, seed: int, count: int) -> None:
        super().__init__(length, seed)
        self._length = length
        self._count = count

    def entry(self, position: int) -> tuple[int, int]:
        """Return the image index at a position, and the number of its draw."""
        return self._image_at(position), position // self._length % self._count

    def draw(self, image: int, number: int) -> Draw:
        """Return a draw of an image by its number."""
        place = image * self._count + number
        # Purposes of version 0.1: other strings would change the draws, and caches on disk would not match them.
        generators = seeded(self._seed, "bank", place), seeded(self._seed, "bank view", place)
        return Draw(image, *generators, derived_seed(self._seed, "bank caption", place))

    def draws(self, start: int, count: int) -> Iterator[Draw]:
        """Yield the draws at `count` positions from `start`."""
        for position in range(start, start + count):
            yield self.draw(*self.entry(position))


class CachedFeatureBatches:
    """Batches with features from a feature cache.

    Args:
        batches: the same batches without features, with the same sampler.
        sampler: draw at each position.
        feature_cache: complete feature cache.
        size: samples per batch.
        device: device of the features.
        dtype: dtype of the base.
    """

    def __init__(
        self,
        batches: BatchSource,
        sampler: CachedFeatureSampler,
        feature_cache: FeatureCache,
        *,
        size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._batches, self._sampler, self._feature_cache = batches, sampler, feature_cache
        self._size, self._device, self._dtype = size, device, dtype

    def __getitem__(self, number: int) -> Batch:
        first = number * self._size
        entries = [self._sampler.entry(position) for position in range(first, first + self._size)]
        features = self._feature_cache.read(entries).to(self._device, self._dtype)
        return replace(self._batches[number], features=features)


class PrefetchedBatches:
    """Batches prepared in a background thread, one ahead; the last ones are kept for other runs.

    Args:
        batches: source of the batches, used by the thread only.
        stride: step between the requested numbers.
        kept: number of batches kept.
    """

    def __init__(self, batches: BatchSource, *, stride: int, kept: int = 1) -> None:
        self._batches, self._stride, self._kept = batches, stride, kept
        self._ready: dict[int, Future[Batch]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")

    def __getitem__(self, number: int) -> Batch:
        batch = self._begin(number)
        self._begin(number + self._stride)
        # kept batches plus the one ahead
        while len(self._ready) > self._kept + 1:
            del self._ready[next(iter(self._ready))]
        return batch.result()

    def _begin(self, number: int) -> Future[Batch]:
        if number not in self._ready:
            self._ready[number] = self._thread.submit(self._batches.__getitem__, number)
        return self._ready[number]
