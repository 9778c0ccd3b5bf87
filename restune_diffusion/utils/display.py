"""Show text that a stranger wrote, and sizes."""

from __future__ import annotations


def printable(text: str, limit: int | None = None) -> str:
    r"""Escape what could drive a terminal (control characters, changes of direction), and cut long text.

    Args:
        text: any text, also with lone surrogates.
        limit: number of characters to keep; None keeps all.
    """
    cut = text if limit is None or len(text) <= limit else f"{text[:limit]}…"
    if cut.isprintable():
        return cut
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in cut)


def readable_size(size: float) -> str:
    """Say a number of bytes in MiB, or in GiB from one on."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
