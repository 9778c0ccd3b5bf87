"""Checks of folders before the libraries are imported."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ..errors import DataError, TrainingError


def check_data(folder: Path, what: str = "image folder") -> None:
    """Raise `DataError` if a folder of images does not exist."""
    if not folder.exists():
        raise DataError(f"The {what} {folder} does not exist; give the path of a folder of images.")


def check_writable(folder: Path) -> None:
    """Check that files can be written to a folder, which need not exist yet.

    Raises:
        TrainingError: if the folder cannot be created or written to.
    """
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not existing.is_dir():
        raise TrainingError(
            f"The output folder {folder} cannot be created, because {existing} is a file; choose another."
        )
    try:
        # The permissions do not tell of a read-only disk, and mean nothing to an administrator.
        with tempfile.TemporaryDirectory(dir=existing, prefix=".restune-"):
            pass
    except OSError as error:
        raise TrainingError(
            f"The output folder {folder} cannot be written to ({error.strerror}); choose another, or change its "
            "permissions."
        ) from error
