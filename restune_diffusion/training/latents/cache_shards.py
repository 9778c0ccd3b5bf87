"""Build the latent cache in parallel: each process of a run encodes its share of the images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import accumulate
from typing import Any, TypeVar

from accelerate import Accelerator

from ...utils.errors import NoImageError
from ..processes import gather_objects
from .cache import Cache

_T = TypeVar("_T")


def build_together(accelerator: Accelerator, examples: Sequence[_T], build: Callable[[Sequence[_T]], Cache]) -> Cache:
    """Return, on every process, the cache of all examples.

    Processes exchange the shares over the network, so the machines need no common folder.

    Args:
        accelerator: accelerator of the run.
        examples: all examples, the same on every process.
        build: encodes some of the examples.

    Raises:
        NoImageError: on every process, if no image of any share can be read.
    """
    if accelerator.num_processes == 1:
        return build(examples)
    part: Cache | NoImageError
    try:
        part = build(share(examples, accelerator.process_index, accelerator.num_processes))
    except NoImageError as error:
        # Raised after the gather, because the other processes wait for this process's share.
        part = error
    parts = gather_objects(accelerator, [part])
    full = [each for each in parts if isinstance(each, Cache)]
    if not full:
        raise next(each for each in parts if isinstance(each, NoImageError))
    return merge(full)


def share(examples: Sequence[_T], index: int, count: int) -> Sequence[_T]:
    """Return the consecutive examples of process `index` of `count`; the shares in order are all examples."""
    return examples[len(examples) * index // count : len(examples) * (index + 1) // count]


def merge(parts: Sequence[Cache]) -> Cache:
    """Merge the caches of consecutive shares."""
    merged: dict[str, Any] = {}
    for field in fields(Cache):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], list):
            merged[field.name] = [item for value in values for item in value]
        elif isinstance(values[0], dict):
            merged[field.name] = {key: item for value in values for key, item in value.items()}
        else:
            merged[field.name] = values[0]
    # Views are indices of entries, so they are shifted by the number of entries before.
    firsts = accumulate((len(part.latents) for part in parts), initial=0)
    merged["views"] = [
        [first + entry for entry in views] for first, part in zip(firsts, parts, strict=False) for views in part.views
    ]
    return Cache(**merged)
