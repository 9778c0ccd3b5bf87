"""Hints about captions and their settings: unused lines, unused wildcards, braces that do not pair up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..config import DataConfig
from .variants import CaptionVariants, caption_lines
from .wildcards import parse_wildcards


class CaptionedImage(NamedTuple):
    """Name of an image, its caption, and the variants of the caption."""

    name: str
    caption: str
    variants: CaptionVariants | None


def caption_hints(config: DataConfig, images: Iterable[CaptionedImage]) -> list[str]:
    """Return hints about the settings of captions, one line each."""
    images = list(images)
    hints = []
    lines = [image for image in images if len(caption_lines([image.caption])) > 1]
    if config.captions == "one" and lines:
        hints.append(
            f"{_captions(lines)} several lines, which are read as one caption. Set --captions all to use each line as "
            f"a caption."
        )
    wild = [image for image in images if _has_wildcard(image.caption)]
    if not config.wildcards and wild:
        hints.append(f"{_captions(wild)} wildcards, which are read as text. Set --wildcards to replace them.")
    unpaired = [image for image in images if image.variants is not None and image.variants.unpaired]
    if unpaired:
        hints.append(
            f"{_captions(unpaired)} braces that do not pair up, so the wildcards in them are read as text. Write "
            f"{{{{ and }}}} for braces that are text; wildcards are not nested."
        )
    return hints


def _captions(images: Sequence[CaptionedImage]) -> str:
    if len(images) == 1:
        return f"The caption of {images[0].name} has"
    return f"{len(images)} captions, that of {images[0].name} first, have"


def _has_wildcard(caption: str) -> bool:
    return any(len(options) > 1 for options in parse_wildcards(caption) or ())
