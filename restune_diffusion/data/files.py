"""List the files of a data folder, whatever is in it."""

from __future__ import annotations

import os
from pathlib import Path

from ..utils.errors import DataError
from .refusals import Refused

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})


def list_images(folder: Path) -> list[Path]:
    """List the image files of a folder and below, in an order that does not depend on the file system."""
    return [path for path in list_files(folder, []) if path.suffix.lower() in IMAGE_SUFFIXES]


def list_files(folder: Path, refused: list[Refused]) -> list[Path]:
    """List the files of a folder and below, in an order that does not depend on the file system.

    Hidden files are left out silently: macOS and some editors leave some that only look like images.

    Args:
        folder: the folder; links to folders inside it are not followed.
        refused: takes what is neither a file nor a folder, and the folders that cannot be read.
    """
    files: list[Path] = []

    def unreadable(error: OSError) -> None:
        refused.append(Refused(str(error.filename), f"cannot be listed ({error.strerror})"))

    for directory, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for link in (Path(directory, name) for name in folders if os.path.islink(Path(directory, name))):
            refused.append(Refused(str(link), "is a link to a folder, and such links are not followed"))
        for path in (Path(directory, name) for name in names if not name.startswith(".")):
            if is_file(path):
                files.append(path)
            else:
                what = "is a link that leads to no file" if path.is_symlink() else "is no regular file"
                refused.append(Refused(str(path), what))
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def is_file(path: Path) -> bool:
    """Say whether a path is that of a file; one that the system cannot even look up is not."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        DataError: if it cannot be read, or is not UTF-8.
    """
    try:
        # Notepad writes a byte order mark, which `utf-8` would leave in front of the first word.
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text; save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from error
