"""Data report of a training run: used images, captions, sizes and skipped files, as text and JSON."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..hooks.placeholder_tokens import split_tokens
from ..utils.atomic_write import atomic_write
from ..utils.display import counted, printable
from .captions import nothing_usable
from .config import DataConfig
from .conventions.hints import data_hints
from .refusals import Refused
from .training_images import Sample

logger = logging.getLogger(__name__)

FILE_NAME = "data.json"
"""Name of the JSON report in the output folder of a run."""
_LISTED = 8
_VERSION = 1


@dataclass(frozen=True)
class Entry:
    """One training image; sizes are (width, height) in pixels."""

    name: str
    caption: str
    original: tuple[int, int]
    size: tuple[int, int]
    repeats: int
    views: int
    digest: bytes

    @property
    def enlarged(self) -> float:
        """Scale factor from the file's size to the training size; below 1 the image is reduced."""
        return max(self.size[0] / self.original[0], self.size[1] / self.original[1])


@dataclass
class DataSheet:
    """Training images of a run and the files it skips.

    Attributes:
        folder: data folder.
        refused: skipped files and rows.
        entries: the training images, in training order.
        beyond_limit: captions longer than the tokenizer's limit, with their number of tokens.
        hints: hints about settings that do not fit the data.
        held_out: images that are held out of training.
    """

    folder: Path
    refused: list[Refused]
    entries: list[Entry] = field(default_factory=list)
    beyond_limit: dict[str, int] = field(default_factory=dict)
    hints: list[str] = field(default_factory=list)
    held_out: list[Entry] = field(default_factory=list)

    def watched(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Yield the samples unchanged and record an entry for each image."""
        for sample in samples:
            self._note(sample)
            yield sample

    def add(self, shares: Iterable[DataSheet]) -> None:
        """Append the entries and refusals of the sheets of several processes, in their order."""
        for share in shares:
            self.entries += share.entries
            self.refused += share.refused

    def check(self) -> None:
        """Raise `DataError` with a reason if there is no training image."""
        if not self.entries:
            raise nothing_usable(self.folder, self.refused)

    def _note(self, sample: Sample) -> None:
        size_conditioning = sample.size_conditioning
        views = 1
        if sample.further:
            views += self.entries.pop().views
        self.entries.append(
            Entry(
                name_inside(sample.name, self.folder),
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
        """Bucket sizes (width, height) with their number of images, most frequent first."""
        return Counter(entry.size for entry in self.entries).most_common()

    @property
    def captions(self) -> list[tuple[str, int]]:
        """Distinct captions with their number of images, most frequent first."""
        return Counter(entry.caption for entry in self.entries).most_common()

    @property
    def duplicates(self) -> list[list[str]]:
        """Groups of names of files with identical bytes; duplicates are still trained on."""
        same: dict[bytes, list[str]] = {}
        for entry in self.entries:
            same.setdefault(entry.digest, []).append(entry.name)
        return [names for names in same.values() if len(names) > 1]

    @property
    def faults(self) -> list[Refused]:
        """Files and rows that are skipped because of an error."""
        return [each.inside(self.folder) for each in self.refused if each.fault]

    @property
    def others(self) -> list[Refused]:
        """Files that are not training images."""
        return [each.inside(self.folder) for each in self.refused if not each.fault]

    def count_tokens(self, tokenizers: Sequence[Any], vectors: Mapping[str, int] | None = None) -> None:
        """Record the captions that exceed the token limit of a tokenizer; training truncates them.

        Args:
            tokenizers: tokenizers of the base.
            vectors: number of vectors of each placeholder token that is trained; each takes the place of a token.
        """
        places = {token.lower(): count for token, count in (vectors or {}).items()}
        for tokenizer in tokenizers:
            limit = tokenizer.model_max_length
            for caption, _ in self.captions:
                plain, placeholders = split_tokens(caption, list(places))
                tokens = len(tokenizer(plain, verbose=False).input_ids) + sum(places[each] for each in placeholders)
                if tokens > limit:
                    self.beyond_limit[caption] = max(tokens, self.beyond_limit.get(caption, 0))

    def hint(self, config: DataConfig, resolution: int) -> None:
        """Record the hints about the settings of the data, once all images are in the sheet."""
        sizes = [size for size, _ in self.buckets]
        self.hints = [
            printable(each) for each in data_hints(config, [e.name for e in self.entries], sizes, resolution)
        ]

    def images_line(self, resolution: int) -> str:
        """Return a one-line summary of the training images."""
        sizes = self.buckets
        shown = sum(entry.repeats for entry in self.entries)
        views = sum(entry.views for entry in self.entries)
        one_size = sizes == [((resolution, resolution), len(self.entries))]
        size = f"at {resolution} x {resolution}" if one_size else f"in {counted(len(sizes), 'size')}"
        line = f"{len(self.entries)} {size}, {counted(len(self.captions), 'caption')}"
        line += f", {shown} shown in an epoch" if shown != len(self.entries) else ""
        return line + (f", {views} views" if views != len(self.entries) else "")

    def notes(self) -> list[str]:
        """Return the files that are left out, one line each."""
        notes = [str(each) for each in self.faults[:_LISTED]]
        if len(self.faults) > _LISTED:
            notes.append(f"And {len(self.faults) - _LISTED} more; {FILE_NAME} lists them.")
        return notes

    def truncated(self) -> list[str]:
        """Return one line about the captions that exceed the token limit, or nothing."""
        if not self.beyond_limit:
            return []
        longest = max(self.beyond_limit.values())
        count = counted(len(self.beyond_limit), "caption")
        return [f"{count} of up to {longest} tokens; the text encoder reads a caption up to its token limit."]

    def held_out_line(self) -> str:
        """Return a one-line summary of the held-out images: their number and first names."""
        names = ", ".join(printable(entry.name) for entry in self.held_out[:_LISTED])
        more = len(self.held_out) - _LISTED
        return f"{counted(len(self.held_out), 'image')}: {names}" + (f" and {more} more" if more > 0 else "")

    def unused(self) -> list[str]:
        """Return the files that are not used, one line for each reason."""
        names: dict[str, list[str]] = {}
        for each in self.others:
            names.setdefault(each.reason, []).append(each.name)
        lines = [
            printable(
                f"{found[0]} {reason}" if len(found) == 1 else f"{len(found)} files, {found[0]} first: each {reason}"
            )
            for reason, found in names.items()
        ]
        more = len(lines) - _LISTED
        return lines[:_LISTED] + (
            [f"And files for {counted(more, 'other reason')}; {FILE_NAME} lists them."] if more > 0 else []
        )

    def warn(self) -> None:
        """Log the warnings about the data, for runs that print nothing."""
        for note in self.notes() + self.truncated() + self.hints + self.unused():
            logger.warning("%s", note)

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values.

        - `version`: 1; it changes when a key is renamed or removed.
        - `folder`: name of the data folder.
        - `images`, `views`, `shown_per_epoch`: number of images, number of crops kept of them, and number of images
          in an epoch, repeats included.
        - `buckets`: `{"width", "height", "images"}` of each size, most frequent first.
        - `captions`: `{"text", "images"}` of each distinct caption, with `"tokens"` if the caption exceeds the text
          encoder's limit.
        - `files`: `{"name", "caption", "width", "height", "bucket", "repeats", "views"}` of each image; width and
          height are those of the file after EXIF rotation, and `bucket` is `[width, height]`.
        - `enlarged`: names of the images that are smaller than their bucket.
        - `duplicates`: lists of names of files with the same bytes.
        - `left_out`: `{"name", "reason", "fault"}`; `fault` is false for files that are not training images.
        - `held_out`: `{"name", "caption", "width", "height", "bucket"}` of each image that is held out of training;
          only there if images are held out.
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
            "files": [{**_facts(entry), "repeats": entry.repeats, "views": entry.views} for entry in self.entries],
            "enlarged": [entry.name for entry in self.entries if entry.enlarged > 1],
            "duplicates": self.duplicates,
            "left_out": [
                {"name": each.name, "reason": each.reason, "fault": each.fault} for each in self.faults + self.others
            ],
            **({"held_out": [_facts(entry) for entry in self.held_out]} if self.held_out else {}),
        }

    def write(self, output: Path) -> None:
        """Write the report to `data.json` in an output folder.

        Raises:
            TunerFileError: if the file cannot be written.
        """
        with atomic_write(output / FILE_NAME) as file:
            file.write(json.dumps(self.as_json(), indent=1).encode())


def _facts(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "caption": entry.caption,
        "width": entry.original[0],
        "height": entry.original[1],
        "bucket": list(entry.size),
    }


def name_inside(name: str, folder: Path) -> str:
    """Return the name of a file for the report: relative to the data folder, if it is in there."""
    path = Path(name)
    return printable(str(path.relative_to(folder) if path.is_relative_to(folder) else path))
