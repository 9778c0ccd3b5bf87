"""Progress of a captioning on disk, so that a job that changes captions does not change one twice."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ...utils.errors import DataError
from .job import CaptionJob

PROGRESS_FILE = ".restune-captions.jsonl"
"""Hidden file in the image folder: the job's description, then one line for each image; removed at the end."""


class Progress:
    """Images that an interrupted job has captioned.

    A job that skips captioned images keeps no such file, since the captions themselves record what is done.

    Args:
        job: the job; progress of another job is discarded.
    """

    def __init__(self, job: CaptionJob) -> None:
        self._folder = job.folder
        self._path = job.folder / PROGRESS_FILE if job.existing != "skip" else None
        self._key = [job.existing, job.trigger_word, job.key]
        self._done: set[str] = set()
        self._file: Any = None

    def __enter__(self) -> Progress:
        if self._path is None:
            return self
        entries = _entries(self._path)
        continues = bool(entries) and entries[0] == self._key
        if continues:
            self._done = {entry for entry in entries[1:] if isinstance(entry, str)}
        try:
            self._file = self._path.open("a" if continues else "w", encoding="utf-8")
        except OSError as error:
            raise DataError(
                f"The image folder {self._folder} cannot be written to ({error.strerror}); change its permissions."
            ) from error
        if not continues:
            self._append(self._key)
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def __contains__(self, image: Path) -> bool:
        return self._name(image) in self._done

    def add(self, image: Path) -> None:
        """Record that an image has its caption."""
        if self._file is not None:
            self._append(self._name(image))

    def finish(self) -> None:
        """Remove the file at the end of the job."""
        if self._path is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)

    def _name(self, image: Path) -> str:
        return image.relative_to(self._folder).as_posix()

    def _append(self, entry: object) -> None:
        # Each line begins with its own line break: after a half-written one, the next is whole.
        self._file.write(f"\n{json.dumps(entry)}")
        self._file.flush()
        os.fsync(self._file.fileno())


def _entries(path: Path) -> list[Any]:
    """Return the entries of a file of progress; a half-written line is left out."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError):
        return []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
