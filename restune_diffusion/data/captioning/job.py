"""Settings and result of a captioning of a folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from ..refusals import Refused

Existing: TypeAlias = Literal["skip", "overwrite", "append", "prepend", "add-line"]
"""Treatment of an image that has a caption: keep it, replace it, extend it, or add a line with a second caption."""


@dataclass(frozen=True)
class CaptionJob:
    """Settings of one captioning of a folder.

    Attributes:
        folder: folder of images; subfolders are included.
        existing: treatment of images that have a caption.
        trigger_word: word at the start of each caption that lacks it.
        batch_size: number of images that the captioner gets at a time.
        key: description of the captioner and its settings; an interrupted job continues only with the same.
    """

    folder: Path
    existing: Existing = "skip"
    trigger_word: str | None = None
    batch_size: int = 8
    key: str = ""


@dataclass
class Outcome:
    """Result of a captioning.

    Attributes:
        images: number of images in the folder.
        written: caption files that were written.
        unchanged: images that had a caption, which was kept, or were captioned before an interruption.
        refused: images without a caption, with the reason.
    """

    images: int = 0
    written: list[Path] = field(default_factory=list)
    unchanged: int = 0
    refused: list[Refused] = field(default_factory=list)
