"""List and read the files of a data folder."""

from __future__ import annotations

import os
from pathlib import Path

from ..utils.errors import DataError
from .conventions.image_suffixes import readable_suffixes
from .refusals import Refused


def list_images(folder: Path) -> list[Path]:
    """Return the image files of a folder and its subfolders, sorted independently of the file system."""
    return [path for path in list_files(folder, []) if is_image(path)]


def list_files(folder: Path, refused: list[Refused]) -> list[Path]:
    """Return the files of a folder and its subfolders, sorted independently of the file system.

    Hidden files are skipped without a note: macOS and some editors create hidden files with image extensions.

    Args:
        folder: the folder; symbolic links to folders inside it are not followed.
        refused: list that receives entries that are neither file nor folder, and folders that cannot be read.
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
                what = "is a broken link" if path.is_symlink() else "is not a regular file"
                refused.append(Refused(str(path), what))
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def is_image(path: Path) -> bool:
    """Return whether a file has the suffix of an image format that can be read here."""
    return path.suffix.lower() in readable_suffixes()


def is_file(path: Path) -> bool:
    """Return whether a path is an existing file; False for a path that the system cannot look up."""
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
        # Notepad writes a byte order mark, which `utf-8` would keep in front of the first word.
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text; save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from error
