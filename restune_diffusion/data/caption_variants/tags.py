"""Comma-separated tags of a caption, shuffled and dropped as in kohya's scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from ...hooks.placeholder_tokens import contains_token
from ..config import DataConfig
from .random_numbers import shuffled


@dataclass(frozen=True)
class Tags:
    """Tags of a caption: `first` and `last` are kept in their place, and `free` are shuffled and dropped."""

    first: tuple[str, ...]
    free: tuple[str, ...]
    last: tuple[str, ...] = ()

    @classmethod
    def of(cls, caption: str, config: DataConfig, words: Sequence[str]) -> Tags:
        """Return the tags of a caption.

        Tags that contain one of the words come first and are kept. So are the first `keep_tags` tags, or those before
        `keep_tags_separator` if the caption contains it. Tags after a second separator are kept at the end.

        Args:
            caption: the caption.
            config: settings of the tags.
            words: trigger word and placeholder tokens.
        """
        separator = config.keep_tags_separator
        if separator and separator in caption:
            first, free, *rest = map(_split, caption.split(separator, 2))
            last = rest[0] if rest else ()
        else:
            tags = _split(caption)
            first, free, last = tags[: config.keep_tags], tags[config.keep_tags :], ()
        named = {tag for tag in (*first, *free) if words and contains_token(tag, words)}
        kept = [tag for tag in (*first, *free) if tag in named] + [tag for tag in first if tag not in named]
        return cls(tuple(kept), tuple(tag for tag in free if tag not in named), last)

    def variant(self, config: DataConfig, numbers: Random) -> str:
        """Return the caption with the free tags in random order, each dropped with the probability `tag_dropout`."""
        free = shuffled(self.free, numbers) if config.shuffle_tags else list(self.free)
        if config.tag_dropout:
            free = [tag for tag in free if numbers.random() >= config.tag_dropout]
        return ", ".join((*self.first, *free, *self.last))


def _split(text: str) -> tuple[str, ...]:
    return tuple(tag for tag in map(str.strip, text.split(",")) if tag)
