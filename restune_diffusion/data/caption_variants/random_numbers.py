"""Random choices from `random.Random.random` alone, whose numbers Python keeps the same in all its versions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import TypeVar

_T = TypeVar("_T")


def shuffled(items: Sequence[_T], numbers: Random) -> list[_T]:
    """Return the items in random order; every order has the same probability."""
    result = list(items)
    for last in range(len(result) - 1, 0, -1):
        other = int(numbers.random() * (last + 1))
        result[last], result[other] = result[other], result[last]
    return result


def balanced(count: int, options: int, numbers: Random) -> Iterator[int]:
    """Yield `count` random numbers below `options`, whose frequencies differ by at most 1.

    Each number alone is uniform. The numbers are random permutations of all options, one after another.
    """
    for start in range(0, count, options):
        yield from shuffled(range(options), numbers)[: count - start]
