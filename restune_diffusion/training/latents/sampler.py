"""The endless stream of training samples: what is drawn at each position depends on the seed and position only.

So a resumed run draws what the uninterrupted one would, two batches of one equal one batch of two, and two
processes share the stream of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ...utils.seeds import seeded


@dataclass(frozen=True)
class Draw:
    """What is random about one training sample: which image, and the source of its noise, timestep and dropout.

    `view` is the source of what is drawn about the image itself, such as whether it is mirrored: a second one, so that
    this does not change the noise.
    """

    index: int
    generator: torch.Generator
    view: torch.Generator


class Shuffle:
    """An endless row of the numbers below a length, each once in every pass, in a new order for every pass.

    Args:
        length: how many numbers there are.
        seed: seed of the run.
        purpose: what it is for; rows for different purposes are independent.
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
    """Shuffles the images anew for every pass over them, and seeds every position.

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
            )

    def _image_at(self, position: int) -> int:
        return self._images[position]


class BucketedSampler(SeededSampler):
    """A stream in which the images of every step are of one bucket, and each image comes equally often.

    Each bucket has an endless row of its own, of which a step takes the next images. In a round of steps every bucket
    is taken as often as its share of the images, in a shuffled order; so the step's number alone tells the bucket and
    the place in its row, however the step is split into batches and processes.

    Args:
        buckets: the images of each bucket, by number.
        seed: seed of the run.
        step: images of one optimizer step, over all batches and processes.
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
        """Return the bucket of a step, and how many steps before it took the same."""
        rounds, turn = divmod(step, len(self._round))
        first = step - turn
        number = self._round[self._turns[step]]
        before = sum(self._round[self._turns[first + earlier]] == number for earlier in range(turn))
        return number, rounds * self._shares[number] + before
