"""Parse `FILE:WEIGHT`, the form in which commands and settings take a file with an optional weight."""

from __future__ import annotations


def split_weight(argument: str) -> tuple[str, float]:
    """Split `FILE:WEIGHT`; the weight is optional (1 by default), and the file name may contain colons."""
    path, colon, weight = argument.rpartition(":")
    if not colon or not path:
        return argument, 1.0
    try:
        return path, float(weight)
    except ValueError:
        # `C:\\tuners\\a.safetensors`, or an invalid weight; the latter is reported as a missing file.
        return argument, 1.0
