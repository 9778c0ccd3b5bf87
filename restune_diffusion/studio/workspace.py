"""Folders of a studio, and the check that a path from the page stays inside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..utils.errors import UsageError


@dataclass(frozen=True)
class Workspace:
    """Folders that the page reads and writes.

    Args:
        home: folder of the studio; made by `create`.
        data_folders: folders of images outside it that the page may read, and write captions to.
    """

    home: Path
    data_folders: Sequence[Path] = field(default=())

    @property
    def tuners(self) -> Path:
        """Folder of the library: tuner files and LoRA files."""
        return self.home / "tuners"

    @property
    def runs(self) -> Path:
        """Output folders of the runs."""
        return self.home / "runs"

    @property
    def data(self) -> Path:
        """Image folders that were uploaded."""
        return self.home / "data"

    @property
    def images(self) -> Path:
        """Generated images."""
        return self.home / "images"

    @property
    def trash(self) -> Path:
        """Deleted tuner files."""
        return self.home / "trash"

    @property
    def queue(self) -> Path:
        """Folder of the queue of runs."""
        return self.home / "queue"

    @property
    def cache(self) -> Path:
        """Uploaded files before they are used, and copies of files that the page shows; emptied regularly."""
        return self.home / "cache"

    def create(self) -> None:
        """Create the folders that do not exist."""
        for folder in (self.tuners, self.runs, self.data, self.images, self.trash, self.queue, self.cache):
            folder.mkdir(parents=True, exist_ok=True)

    def inside(self, path: str | Path, *roots: Path) -> Path:
        """Return the resolved path if it lies in one of the folders, with links followed.

        Args:
            path: a path from the page; a relative one is relative to the first folder.
            roots: allowed folders.

        Raises:
            UsageError: if the path leads elsewhere.
        """
        text = str(path)
        if "\0" not in text:
            resolved = (roots[0] / text).resolve()
            if any(resolved.is_relative_to(root.resolve()) for root in roots):
                return resolved
        raise UsageError(f"{text!r} is outside the folders of the studio; choose a path in {roots[0].name}.")
