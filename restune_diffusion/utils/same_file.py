"""Comparison of paths by the file that they lead to."""

from __future__ import annotations

from pathlib import Path


def is_same_file(first: Path, second: Path) -> bool:
    """Return whether two paths lead to one file: by another spelling, a symbolic link or a hard link."""
    first, second = first.expanduser(), second.expanduser()
    if first.exists() and second.exists():
        return first.samefile(second)
    return first.resolve() == second.resolve()
