"""Images that are held out of training: their choice, and their encodings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ...data.captions import read_examples
from ...data.condition_source import ConditionSource
from ...data.data_sheet import DataSheet, Entry, name_inside
from ...data.example import Example
from ...data.image_transform import ImageTransform
from ...data.refusals import Refused
from ...utils.display import counted
from ...utils.errors import DataError
from ..config.train_config import TrainConfig
from ..latents.cache import Cache
from ..latents.examples import encode_examples


@dataclass(frozen=True)
class HeldOut:
    """Held-out images; the three sequences have the same order.

    Attributes:
        examples: files and captions.
        entries: names, captions, sizes and hashes, as in the data sheet.
        cache: encodings; one view of each image, from its center crop.
    """

    examples: tuple[Example, ...]
    entries: tuple[Entry, ...]
    cache: Cache


@dataclass(frozen=True)
class Split:
    """Examples to train on, and held-out examples with their folder and the source of their condition images."""

    training: list[Example]
    held_out: list[Example]
    folder: Path
    conditions: ConditionSource | None


def hold_out(
    config: TrainConfig, examples: list[Example], conditions: ConditionSource | None, refused: list[Refused]
) -> Split:
    """Hold out the images that the settings ask for.

    Args:
        config: settings of the run.
        examples: all examples of the data folder, with their condition images.
        conditions: source of the condition images.
        refused: list that receives the skipped files of a separate folder of held-out images.

    Raises:
        DataError: if no image is left to train on, or the separate folder cannot be used.
    """
    holdout, folder = config.validation.holdout, config.data.folder
    if isinstance(holdout, Path):
        held_out, conditions = _in_folder(config, holdout, conditions, refused)
        return Split(examples, held_out, holdout, conditions)
    if holdout is None:
        return Split(examples, [], folder, conditions)
    chosen = chosen_examples(examples, holdout, config.validation.holdout_seed)
    if len(chosen) == len(examples):
        raise DataError(
            f"Holding out {counted(len(chosen), 'image')} leaves none to train on, because {folder} has "
            f"{counted(len(examples), 'usable image')}; lower --validation.holdout (now {holdout:g}), or give it a "
            f"folder of other images."
        )
    training = [example for number, example in enumerate(examples) if number not in chosen]
    return Split(training, [examples[number] for number in sorted(chosen)], folder, conditions)


def chosen_examples(examples: Sequence[Example], holdout: int | float, seed: int) -> set[int]:
    """Return the indices of the examples to hold out.

    They are the first ones in an order by a hash of the seed and the bytes of each image. So names and the order of
    files do not matter, copies of an image are held out together, and a new image either joins the held-out ones in
    place of the last of them or leaves them unchanged.

    Args:
        examples: all examples.
        holdout: number of images, or a fraction of them, of which at least one is held out.
        seed: seed of the choice.
    """
    copies: dict[bytes, list[int]] = {}
    for number, example in enumerate(examples):
        try:
            content = example.read()
        except (OSError, DataError):
            continue  # training reports it as unreadable
        key = hashlib.sha256(f"held out {seed} ".encode() + hashlib.sha256(content).digest()).digest()
        copies.setdefault(key, []).append(number)
    count = holdout if isinstance(holdout, int) else max(1, round(holdout * sum(map(len, copies.values()))))
    chosen: set[int] = set()
    for key in sorted(copies):
        if len(chosen) < count:
            chosen |= {*copies[key]}
    return chosen


def encode_held_out(
    accelerator: Accelerator,
    pipeline: Any,
    split: Split,
    resolution: int,
    transform: ImageTransform,
    sheet: DataSheet,
) -> HeldOut | None:
    """Encode the held-out images, without random crops and mirroring, and enter them in the run's data sheet.

    Args:
        accelerator: accelerator of the run.
        pipeline: the base.
        split: the examples.
        resolution: side of the square images in pixels.
        transform: transform of the training images.
        sheet: data sheet of the run, which has the training images.

    Returns:
        The held-out images, or None if there are none.

    Raises:
        DataError: if none of them can be used, or one of them is also a training image.
    """
    if not split.held_out:
        return None
    plain = replace(transform, crop_variants=None, flip=False)
    cache, own = encode_examples(
        accelerator, pipeline, split.held_out, split.folder, resolution, plain, split.conditions
    )
    sheet.refused += own.refused
    if cache is None:
        raise DataError(f"None of the {counted(len(split.held_out), 'held-out image')} can be used: {own.refused[0]}")
    _check_apart(sheet.entries, own.entries)
    sheet.held_out = own.entries
    usable = tuple(_used(split, own.entries))
    return HeldOut(usable, tuple(own.entries), cache)


def _used(split: Split, entries: Iterable[Entry]) -> Iterator[Example]:
    """Yield the examples of the entries, which are the examples without those that cannot be used."""
    examples = iter(split.held_out)
    for entry in entries:
        yield next(each for each in examples if name_inside(str(each.path), split.folder) == entry.name)


def _check_apart(training: Sequence[Entry], held_out: Sequence[Entry]) -> None:
    known = {entry.digest: entry.name for entry in training}
    for entry in held_out:
        if entry.digest in known:
            raise DataError(
                f"The held-out image {entry.name} is also the training image {known[entry.digest]}; remove one."
            )


def _in_folder(
    config: TrainConfig, folder: Path, conditions: ConditionSource | None, refused: list[Refused]
) -> tuple[list[Example], ConditionSource | None]:
    """Return the examples of a separate folder, read as the data folder is, and the source of their conditions."""
    data, own = config.data.folder.resolve(), folder.resolve()
    if own.is_relative_to(data) or data.is_relative_to(own):
        raise DataError(
            f"The folder of held-out images {folder} overlaps the image folder {config.data.folder}, whose images are "
            f"trained on; move the held-out images to a folder beside it."
        )
    examples = read_examples(config.data.model_copy(update={"folder": folder}), refused)
    if conditions is None or config.conditioned is None:
        return examples, None
    source = ConditionSource(config.conditioned, config.control_data)
    examples = source.paired(examples, folder)
    if source.describe() != conditions.describe():
        raise DataError(
            f"The held-out images have the conditions {source.describe()}, but the training images have "
            f"{conditions.describe()}; give both the same."
        )
    return examples, source
