"""Checks of paths before the libraries are imported, which takes seconds."""

from __future__ import annotations

import os
from pathlib import Path

from ...utils.errors import DataError, TrainingError


def check_folders(data: Path, output: Path) -> None:
    """Check that the image folder exists, and that the output folder can be written to.

    Raises:
        DataError: if there is no image folder.
        TrainingError: if the output folder cannot be created or written to.
    """
    if not data.exists():
        raise DataError(f"The image folder {data} does not exist; give the path of a folder of images.")
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise TrainingError(
            f"The output folder {output} cannot be created, because {existing} is a file; choose another."
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise TrainingError(
            f"The output folder {output} cannot be written to; choose another, or change its permissions."
        )
