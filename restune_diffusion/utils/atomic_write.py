"""Atomic file writes: a crash leaves the old file or the new one, never a partial file."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import TunerFileError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary file and rename it to `path` after it was written, synced and closed without an error.

    A crash at any time leaves either the complete old file or the complete new one.

    Raises:
        TunerFileError: if the file cannot be written, for instance on a full disk; the old file is kept.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise TunerFileError(
            f"Cannot write {path}: {error.strerror or error}; free space or choose another folder "
            "(an existing file is unchanged)."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries to disk, so that a new or renamed file survives a power failure."""
    # Windows has no directory handles to sync.
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
