"""Training batches whose features come from a bank, and are read while the step before them is computed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from ...utils.seeds import seeded
from ..latents.batches import Batch, BatchSource
from ..latents.sampler import Draw, SeededSampler
from .cache import FeatureCache


class CachedFeatureSampler(SeededSampler):
    """A stream that draws each image in so many ways and no others, one after the other from pass to pass.

    As the draws of an image are independent of each other, their order does not matter.

    Args:
        length: number of images.
        seed: seed of the run.
        count: draws of each image.
    """

    def __init__(self, length: int, seed: int, count: int) -> None:
        super().__init__(length, seed)
        self._length = length
        self._count = count

    def entry(self, position: int) -> tuple[int, int]:
        """Return which image is drawn at a position, and the number of its draw."""
        return self._image_at(position), position // self._length % self._count

    def draw(self, image: int, number: int) -> Draw:
        """Return one of the draws of an image."""
        place = image * self._count + number
        return Draw(image, seeded(self._seed, "bank", place), seeded(self._seed, "bank view", place))

    def draws(self, start: int, count: int) -> Iterator[Draw]:
        """Yield the draws at `count` positions from `start`."""
        for position in range(start, start + count):
            yield self.draw(*self.entry(position))


class CachedFeatureBatches:
    """Batches with the features of a bank.

    Args:
        batches: the same batches without features; they draw from the stream.
        stream: which draw is at which position.
        bank: where the features are; complete.
        size: samples of a batch.
        device: where the features go.
        dtype: dtype of the base.
    """

    def __init__(
        self,
        batches: BatchSource,
        stream: CachedFeatureSampler,
        feature_cache: FeatureCache,
        *,
        size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._batches, self._stream, self._bank = batches, stream, feature_cache
        self._size, self._device, self._dtype = size, device, dtype

    def __getitem__(self, number: int) -> Batch:
        first = number * self._size
        entries = [self._stream.entry(position) for position in range(first, first + self._size)]
        features = self._bank.read(entries).to(self._device, self._dtype)
        return replace(self._batches[number], features=features)


class PrefetchedBatches:
    """Prepares the next batch in a thread of its own, and keeps the last ones for others that want the same.

    Args:
        batches: where they come from; asked from that thread alone.
        stride: distance between the numbers that are asked for.
        kept: how many batches stay.
    """

    def __init__(self, batches: BatchSource, *, stride: int, kept: int = 1) -> None:
        self._batches, self._stride, self._kept = batches, stride, kept
        self._ready: dict[int, Future[Batch]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")

    def __getitem__(self, number: int) -> Batch:
        batch = self._begin(number)
        self._begin(number + self._stride)
        # besides those that stay, the one ahead
        while len(self._ready) > self._kept + 1:
            del self._ready[next(iter(self._ready))]
        return batch.result()

    def _begin(self, number: int) -> Future[Batch]:
        if number not in self._ready:
            self._ready[number] = self._thread.submit(self._batches.__getitem__, number)
        return self._ready[number]
