"""Build the cache by all processes of a run together, each encoding its share of the images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import accumulate
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object

from ...utils.errors import NoImageError
from .cache import Cache

_T = TypeVar("_T")


def build_together(accelerator: Accelerator, examples: Sequence[_T], build: Callable[[Sequence[_T]], Cache]) -> Cache:
    """Return, on every process, the cache that one process would build of all examples.

    Nothing is shared through files, so the machines of a run need no common folder.

    Args:
        accelerator: tells which process this is, of how many.
        examples: all of the data, the same on every process.
        build: encodes some of it.

    Raises:
        NoImageError: on every process, if no image of any share can be read.
    """
    if accelerator.num_processes == 1:
        return build(examples)
    part: Cache | NoImageError
    try:
        part = build(share(examples, accelerator.process_index, accelerator.num_processes))
    except NoImageError as error:
        # Told to the others first, which would wait for this process's share.
        part = error
    parts = gather_object([part])
    full = [each for each in parts if isinstance(each, Cache)]
    if not full:
        raise parts[0]
    return merge(full)


def share(examples: Sequence[_T], index: int, count: int) -> Sequence[_T]:
    """Return the share of one of `count` processes: neighbours, so that the shares in a row are the whole in order."""
    return examples[len(examples) * index // count : len(examples) * (index + 1) // count]


def merge(parts: Sequence[Cache]) -> Cache:
    """Put the caches of neighbouring shares together."""
    merged: dict[str, Any] = {}
    for field in fields(Cache):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], list):
            merged[field.name] = [item for value in values for item in value]
        elif isinstance(values[0], dict):
            merged[field.name] = {key: item for value in values for key, item in value.items()}
        else:
            merged[field.name] = values[0]
    # Views are numbers of entries, which those of the shares before shift.
    firsts = accumulate((len(part.latents) for part in parts), initial=0)
    merged["views"] = [
        [first + entry for entry in views] for first, part in zip(firsts, parts, strict=False) for views in part.views
    ]
    return Cache(**merged)
