"""Endless samplers of training data: the sample at a position depends only on the seed and the position.

So a resumed run has the same samples as an uninterrupted one, two batches of size 1 equal one batch of size 2, and two
processes have the same samples as one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ...utils.seeds import derived_seed, seeded


@dataclass(frozen=True)
class Draw:
    """Random state of one training sample: image index, and the generator of its noise, timestep and dropout.

    `view` is the generator for the image itself, such as whether it is flipped. It is separate, so that it does not
    change the noise. `caption` is a random number for the choice of a caption, far larger than the number of captions.
    """

    index: int
    generator: torch.Generator
    view: torch.Generator
    caption: int = 0


class Shuffle:
    """Endless sequence of the numbers below a length, each once per epoch, in a new random order every epoch.

    Args:
        length: how many numbers there are.
        seed: seed of the run.
        purpose: purpose string; sequences with different purposes are independent.
    """

    def __init__(self, length: int, seed: int, purpose: str = "order") -> None:
        self._length = length
        self._seed = seed
        self._purpose = purpose
        self._epoch = -1
        self._order: list[int] = []

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self._length)
        if epoch != self._epoch:
            order = torch.randperm(self._length, generator=seeded(self._seed, self._purpose, epoch))
            self._epoch, self._order = epoch, order.tolist()
        return self._order[place]


class SeededSampler:
    """Sampler that shuffles the images every epoch and seeds every position.

    Args:
        length: number of images.
        seed: seed of the run.
    """

    def __init__(self, length: int, seed: int) -> None:
        self._seed = seed
        self._images = Shuffle(length, seed)

    def draws(self, start: int, count: int) -> Iterator[Draw]:
        """Yield the draws at `count` positions from `start`."""
        for position in range(start, start + count):
            yield Draw(
                self._image_at(position),
                seeded(self._seed, "sample", position),
                seeded(self._seed, "view", position),
                derived_seed(self._seed, "caption", position),
            )

    def _image_at(self, position: int) -> int:
        return self._images[position]


class BucketedSampler(SeededSampler):
    """Sampler in which all images of a step are from one bucket, and all images are equally frequent.

    Each bucket has its own endless sequence, from which a step takes the next images. In a round of steps, each bucket
    occurs in proportion to its share of the images, in shuffled order. So the bucket of a step and the position in its
    sequence depend only on the step's number, not on how the step is split into batches and processes.

    Args:
        buckets: indices of each bucket's images.
        seed: seed of the run.
        step: images per optimizer step, over all batches and processes.
    """

    def __init__(self, buckets: Sequence[Sequence[int]], seed: int, step: int) -> None:
        super().__init__(sum(map(len, buckets)), seed)
        self._buckets = buckets
        self._step = step
        self._rows = [Shuffle(len(bucket), seed, f"order of {number}") for number, bucket in enumerate(buckets)]
        common = math.gcd(*map(len, buckets))
        self._shares = [len(bucket) // common for bucket in buckets]
        self._round = [number for number, share in enumerate(self._shares) for _ in range(share)]
        self._turns = Shuffle(len(self._round), seed, "buckets")
        self._known = (-1, (0, 0))

    def _image_at(self, position: int) -> int:
        step, place = divmod(position, self._step)
        if step != self._known[0]:
            self._known = step, self._turn(step)
        number, taken = self._known[1]
        return self._buckets[number][self._rows[number][taken * self._step + place]]

    def _turn(self, step: int) -> tuple[int, int]:
        """Return the bucket of a step, and the number of earlier steps with the same bucket."""
        rounds, turn = divmod(step, len(self._round))
        first = step - turn
        number = self._round[self._turns[step]]
        before = sum(self._round[self._turns[first + earlier]] == number for earlier in range(turn))
        return number, rounds * self._shares[number] + before
