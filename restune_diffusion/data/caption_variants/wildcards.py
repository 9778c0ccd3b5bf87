"""Wildcards of kohya's scripts in captions: `{a|b|c}` is one of the options, `{{` and `}}` are braces."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random
from typing import TypeAlias

from .random_numbers import balanced

Options: TypeAlias = tuple[str, ...]
"""Options of a part of a caption: those of a wildcard, or the one text between wildcards."""

# Stand-ins for escaped braces; captions have no NUL characters.
_LEFT, _RIGHT = "\0<", "\0>"
_PAIRED = re.compile(r"[^{}]*(\{[^{}]*\}[^{}]*)*")
_WILDCARD = re.compile(r"\{([^{}]+)\}")


def parse_wildcards(caption: str) -> list[Options] | None:
    """Return the parts of a caption, or None if its braces do not pair up; wildcards are not nested."""
    escaped = caption.replace("{{", _LEFT).replace("}}", _RIGHT)
    if not _PAIRED.fullmatch(escaped):
        return None
    # Every second part is the inside of a wildcard.
    parts = enumerate(_WILDCARD.split(escaped))
    return [tuple(map(_unescaped, part.split("|") if number % 2 else [part])) for number, part in parts]


def expand_wildcards(parts: Sequence[Options], count: int, numbers: Random) -> list[str]:
    """Return `count` captions with one option of each part, each option equally often where `count` allows it."""
    columns = [[options[each] for each in balanced(count, len(options), numbers)] for options in parts]
    return ["".join(row) for row in zip(*columns, strict=True)]


def _unescaped(text: str) -> str:
    return text.replace(_LEFT, "{").replace(_RIGHT, "}")
