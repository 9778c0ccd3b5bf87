"""Caption files next to images: `a.txt`, `a.caption`, `a.png.txt`, in upper or lower case."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

CAPTION_SUFFIXES = (".txt", ".caption")
"""Suffixes of caption files: that of most tools, and the default of kohya's scripts (`--caption_extension`)."""


class CaptionFiles:
    """Caption files of a folder, found by the name of their image.

    Args:
        files: all files of the folder.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._files: dict[str, list[Path]] = {}
        for path in files:
            if is_caption_file(path):
                self._files.setdefault(str(path).casefold(), []).append(path)

    def of(self, image: Path) -> Path | None:
        """Return the caption file of an image: by the full file name, then by the name without its suffix.

        `.txt` comes before `.caption`, and a name that differs only in case comes after the exact one.
        """
        for base in (image, image.with_suffix("")):
            for suffix in CAPTION_SUFFIXES:
                exact = f"{base}{suffix}"
                found = self._files.get(exact.casefold(), ())
                if found:
                    return min(found, key=lambda path: (str(path) != exact, path.stem != base.name, str(path)))
        return None


def is_caption_file(path: Path) -> bool:
    """Return whether a file has the suffix of a caption file."""
    return path.suffix.lower() in CAPTION_SUFFIXES
