"""Caption variants of an image: chosen once from the run's seed, so that their text embeddings are cached."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from ..config import DataConfig
from .tags import Tags
from .wildcards import expand_wildcards, parse_wildcards


@dataclass(frozen=True)
class CaptionVariants:
    """Captions of an image, one of which is chosen each time that the image is shown.

    Attributes:
        texts: the variants, all with the same probability; a text may occur more than once.
        written: number of captions as written.
        unpaired: whether the wildcards of a caption are read as text, because its braces do not pair up.
    """

    texts: tuple[str, ...]
    written: int = 1
    unpaired: bool = False

    @property
    def distinct(self) -> tuple[str, ...]:
        """The different variants, in their order."""
        return tuple(dict.fromkeys(self.texts))


def caption_variants(
    captions: Sequence[str], config: DataConfig, numbers: Random, words: Sequence[str] = ()
) -> CaptionVariants:
    """Return the variants of an image's captions.

    Every caption has equally many variants: as few as make `caption_variants` or more together. Without tags to change
    and without wildcards, the captions are the variants.

    Args:
        captions: the captions as written.
        config: settings of captions, tags and wildcards.
        numbers: random numbers.
        words: trigger word and placeholder tokens, whose tags are kept.
    """
    count = -(-config.caption_variants // len(captions)) if config.changes_captions else 1
    texts: list[str] = []
    unpaired = False
    for caption in captions:
        parts = parse_wildcards(caption) if config.wildcards else [(caption,)]
        unpaired |= parts is None
        found = expand_wildcards(parts or [(caption,)], count, numbers)
        if config.shuffle_tags or config.tag_dropout:
            found = [Tags.of(text, config, words).variant(config, numbers) for text in found]
        texts += found
    return CaptionVariants(tuple(texts), len(captions), unpaired)


def caption_lines(texts: Sequence[str]) -> list[str]:
    """Return the lines of captions that contain text."""
    # Not `splitlines`, which also breaks lines at characters that captions may contain.
    return [line.strip() for text in texts for line in re.split(r"[\r\n]+", text) if line.strip()]
