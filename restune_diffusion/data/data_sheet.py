"""What is trained on, as a person and other programs read it."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..utils.atomic_write import atomic_write
from ..utils.display import printable
from .captions import nothing_usable
from .refusals import Refused
from .training_images import Sample

logger = logging.getLogger(__name__)

FILE_NAME = "data.json"
"""Where a run writes its sheet, in its output folder."""
_LISTED = 8
_VERSION = 1


@dataclass(frozen=True)
class Entry:
    """One image that is trained on; sizes are (width, height) in pixels."""

    name: str
    caption: str
    original: tuple[int, int]
    size: tuple[int, int]
    repeats: int
    views: int
    digest: bytes

    @property
    def enlarged(self) -> float:
        """How much longer its sides are than in the file; below one it is made smaller."""
        return max(self.size[0] / self.original[0], self.size[1] / self.original[1])


@dataclass
class DataSheet:
    """What a run trains on and what it leaves out.

    Attributes:
        folder: folder of the data.
        refused: what is left out.
        entries: the images, in their order.
        beyond_limit: captions that are longer than the tokenizer reads, by their number of tokens.
    """

    folder: Path
    refused: list[Refused]
    entries: list[Entry] = field(default_factory=list)
    beyond_limit: dict[str, int] = field(default_factory=dict)

    def watched(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Pass samples on and write down what they are."""
        for sample in samples:
            self._note(sample)
            yield sample

    def add(self, shares: Iterable[DataSheet]) -> None:
        """Take over what is written down of the data's shares, in their order."""
        for share in shares:
            self.entries += share.entries
            self.refused += share.refused

    def check(self) -> None:
        """Raise `DataError`, naming a reason, if there is nothing to train on."""
        if not self.entries:
            raise nothing_usable(self.folder, self.refused)

    def _note(self, sample: Sample) -> None:
        size_conditioning = sample.size_conditioning
        views = 1
        if sample.further:
            views += self.entries.pop().views
        self.entries.append(
            Entry(
                _inside(sample.name, self.folder),
                sample.caption,
                (size_conditioning.original[1], size_conditioning.original[0]),
                (size_conditioning.size[1], size_conditioning.size[0]),
                sample.repeats,
                views,
                sample.digest,
            )
        )

    @property
    def buckets(self) -> list[tuple[tuple[int, int], int]]:
        """The sizes, (width, height), each with its number of images, the commonest first."""
        return Counter(entry.size for entry in self.entries).most_common()

    @property
    def captions(self) -> list[tuple[str, int]]:
        """The distinct captions, each with its number of images, the commonest first."""
        return Counter(entry.caption for entry in self.entries).most_common()

    @property
    def duplicates(self) -> list[list[str]]:
        """Names of files that hold the same bytes; they are trained on all the same."""
        same: dict[bytes, list[str]] = {}
        for entry in self.entries:
            same.setdefault(entry.digest, []).append(entry.name)
        return [names for names in same.values() if len(names) > 1]

    @property
    def faults(self) -> list[Refused]:
        """What is left out because something is wrong with it."""
        return [each.inside(self.folder) for each in self.refused if each.fault]

    @property
    def others(self) -> list[Refused]:
        """Files that are not meant to be trained on."""
        return [each.inside(self.folder) for each in self.refused if not each.fault]

    def count_tokens(self, tokenizers: Sequence[Any]) -> None:
        """Write down the captions of which a text encoder sees only the beginning.

        Args:
            tokenizers: those of the base.
        """
        for tokenizer in tokenizers:
            limit = tokenizer.model_max_length
            for caption, _ in self.captions:
                tokens = len(tokenizer(caption, verbose=False).input_ids)
                if tokens > limit:
                    self.beyond_limit[caption] = max(tokens, self.beyond_limit.get(caption, 0))

    def images_line(self, resolution: int) -> str:
        """Say in one line what is trained on."""
        sizes = self.buckets
        shown = sum(entry.repeats for entry in self.entries)
        views = sum(entry.views for entry in self.entries)
        one_size = sizes == [((resolution, resolution), len(self.entries))]
        size = f"at {resolution} x {resolution}" if one_size else f"in {counted(len(sizes), 'size')}"
        line = f"{len(self.entries)} {size}, {len(self.captions)} captions"
        line += f", {shown} shown in an epoch" if shown != len(self.entries) else ""
        return line + (f", {views} views" if views != len(self.entries) else "")

    def notes(self) -> list[str]:
        """Say what a person should know before this is trained on, each in a line."""
        notes = [str(each) for each in self.faults[:_LISTED]]
        if len(self.faults) > _LISTED:
            notes.append(f"And {len(self.faults) - _LISTED} more; {FILE_NAME} lists them.")
        if self.beyond_limit:
            longest = max(self.beyond_limit.values())
            notes.append(
                f"{counted(len(self.beyond_limit), 'caption')} of up to {longest} tokens, of which the text encoder "
                f"sees only the beginning."
            )
        return notes

    def warn(self) -> None:
        """Log what a person should know, where nothing is printed."""
        for note in self.notes():
            logger.warning("%s", note)

    def as_json(self) -> dict[str, Any]:
        """Return all of it as plain JSON values.

        - `version`: 1; it changes where a key is renamed or goes.
        - `folder`: name of the data's folder.
        - `images`, `views`, `shown_per_epoch`: how many images there are, how many cuts of them are kept, and how many
          images an epoch shows, repeats included.
        - `buckets`: `{"width", "height", "images"}` of each size, the commonest first.
        - `captions`: `{"text", "images"}` of each distinct caption, with `"tokens"` where these are too many for the
          text encoder.
        - `files`: `{"name", "caption", "width", "height", "bucket", "repeats", "views"}` of each image; width and
          height are the file's, upright, and `bucket` is `[width, height]`.
        - `enlarged`: names of the images that are smaller than their bucket.
        - `duplicates`: lists of names of files with the same bytes.
        - `left_out`: `{"name", "reason", "fault"}`; `fault` is false for files that are not meant as training images.
        """
        return {
            "version": _VERSION,
            "folder": self.folder.resolve().name,
            "images": len(self.entries),
            "views": sum(entry.views for entry in self.entries),
            "shown_per_epoch": sum(entry.repeats for entry in self.entries),
            "buckets": [{"width": size[0], "height": size[1], "images": count} for size, count in self.buckets],
            "captions": [
                {"text": text, "images": count}
                | ({"tokens": self.beyond_limit[text]} if text in self.beyond_limit else {})
                for text, count in self.captions
            ],
            "files": [
                {
                    "name": entry.name,
                    "caption": entry.caption,
                    "width": entry.original[0],
                    "height": entry.original[1],
                    "bucket": list(entry.size),
                    "repeats": entry.repeats,
                    "views": entry.views,
                }
                for entry in self.entries
            ],
            "enlarged": [entry.name for entry in self.entries if entry.enlarged > 1],
            "duplicates": self.duplicates,
            "left_out": [
                {"name": each.name, "reason": each.reason, "fault": each.fault} for each in self.faults + self.others
            ],
        }

    def write(self, output: Path) -> None:
        """Write the sheet into an output folder.

        Raises:
            TunerFileError: if it cannot be written.
        """
        with atomic_write(output / FILE_NAME) as file:
            file.write(json.dumps(self.as_json(), indent=1).encode())


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where it is not one."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _inside(name: str, folder: Path) -> str:
    path = Path(name)
    return printable(str(path.relative_to(folder) if path.is_relative_to(folder) else path))
