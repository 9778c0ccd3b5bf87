"""Folders that a reader finds whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def replace_folder(new: Path, folder: Path) -> None:
    """Put a finished folder in another's place; a reader finds one of the two."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)
