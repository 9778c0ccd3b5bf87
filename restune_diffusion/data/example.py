"""Training example: path, caption and condition files of one image, before it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..utils.errors import DataError


@dataclass(frozen=True)
class Example:
    """A training image with its caption and its condition files.

    Attributes:
        path: file of the image; for a row of a saved dataset, the dataset's folder and the row number.
        caption: training caption.
        conditions: condition image files, keyed by the condition's name or number.
        repeats: number of times that an epoch uses the image.
        content: function that returns the encoded image; None if the image is the file at `path`.
    """

    path: Path
    caption: str
    conditions: Mapping[str | int, Path] = field(default_factory=dict)
    repeats: int = 1
    content: Callable[[], bytes] | None = None

    def read(self) -> bytes:
        """Return the encoded image as bytes."""
        return self.path.read_bytes() if self.content is None else self.content()


def check_caption(caption: str) -> None:
    """Raise `DataError` for a caption that a tokenizer cannot process.

    Raises:
        DataError: if the caption contains NUL characters or lone surrogates. The message continues a sentence that
            starts with the name of the image.
    """
    if "\0" in caption:
        raise DataError("has a caption with NUL characters; save it as UTF-8")
    if any("\ud800" <= sign <= "\udfff" for sign in caption):
        raise DataError("has a caption with broken characters; save it as UTF-8")
