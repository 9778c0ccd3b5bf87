"""One image to train on, before it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..utils.errors import DataError


@dataclass(frozen=True)
class Example:
    """An image, its caption, and the files of images that steer it, by the condition's name or number.

    Attributes:
        path: the image's file; for a row of a dataset a name that stands for it.
        caption: what is trained with it.
        conditions: files of the images that steer it.
        repeats: how often an epoch shows it.
        content: returns the bytes of the image, where they are not those of the file.
    """

    path: Path
    caption: str
    conditions: Mapping[str | int, Path] = field(default_factory=dict)
    repeats: int = 1
    content: Callable[[], bytes] | None = None

    def read(self) -> bytes:
        """Return the encoded image."""
        return self.path.read_bytes() if self.content is None else self.content()


def check_caption(caption: str) -> None:
    """Refuse a caption that no text encoder can read.

    Raises:
        DataError: if it holds NUL characters or halves of characters; said as the rest of a sentence.
    """
    if "\0" in caption:
        raise DataError("has a caption with NUL characters; save it as UTF-8")
    if any("\ud800" <= sign <= "\udfff" for sign in caption):
        raise DataError("has a caption with broken characters; save it as UTF-8")
