"""The endless stream of training samples: what is drawn at each position depends on the seed and position only.

So a resumed run draws what the uninterrupted one would, two batches of one equal one batch of two, and two
processes share the stream of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Draw:
    """What is random about one training sample: which image, and the source of its noise, timestep and dropout."""

    index: int
    generator: torch.Generator


class SampleStream:
    """Shuffles the images anew for every pass over them, and seeds every position.

    Args:
        length: number of images.
        seed: seed of the run.
    """

    def __init__(self, length: int, seed: int) -> None:
        self._length = length
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def draws(self, start: int, count: int) -> Iterator[Draw]:
        """Yield the draws at `count` positions from `start`."""
        for position in range(start, start + count):
            yield Draw(self._image_at(position), self._generator("sample", position))

    def _image_at(self, position: int) -> int:
        epoch, place = divmod(position, self._length)
        if epoch != self._epoch:
            order = torch.randperm(self._length, generator=self._generator("order", epoch))
            self._epoch, self._order = epoch, order.tolist()
        return self._order[place]

    def _generator(self, purpose: str, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(derived_seed(self._seed, purpose, number))


def derived_seed(seed: int, purpose: str, number: int = 0) -> int:
    """Return a seed that depends on the run's, on what it is for, and on a number."""
    # A hash, because neighbouring seeds of the same purpose would overlap between runs: (seed 0, position 1)
    # and (seed 1, position 0).
    digest = hashlib.blake2b(f"{seed}/{purpose}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
