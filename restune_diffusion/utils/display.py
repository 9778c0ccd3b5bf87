"""Format untrusted text and sizes in bytes for display."""

from __future__ import annotations


def printable(text: str, limit: int | None = None) -> str:
    r"""Escape characters that a terminal would interpret (control and bidirectional characters); truncate long text.

    Args:
        text: any text, including lone surrogates.
        limit: number of characters to keep; None keeps all.
    """
    truncated = text if limit is None or len(text) <= limit else f"{text[:limit]}…"
    if truncated.isprintable():
        return truncated
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in truncated)


def readable_size(size: float) -> str:
    """Format a number of bytes in MiB, or in GiB from 1 GiB upwards."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, plural unless the number is 1."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
