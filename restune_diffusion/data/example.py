"""Training example: path, caption and condition files of one image, before it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..utils.errors import DataError
from .caption_variants.variants import CaptionVariants


@dataclass(frozen=True)
class Example:
    """A training image with its caption and its condition files.

    Attributes:
        path: file of the image; for a row of a saved dataset, the dataset's folder and the row number.
        caption: training caption.
        conditions: condition image files, keyed by the condition's name or number.
        repeats: number of times that an epoch uses the image.
        captions: captions of an image that has a list of them; empty if it has one.
        variants: captions of which each use of the image picks one; None if there is only `caption`.
        content: function that returns the encoded image; None if the image is the file at `path`.
    """

    path: Path
    caption: str
    conditions: Mapping[str | int, Path] = field(default_factory=dict)
    repeats: int = 1
    captions: tuple[str, ...] = ()
    variants: CaptionVariants | None = None
    content: Callable[[], bytes] | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The different captions that the image is trained with."""
        return self.variants.distinct if self.variants is not None else (self.caption,)

    def read(self) -> bytes:
        """Return the encoded image as bytes."""
        return self.path.read_bytes() if self.content is None else self.content()


def caption_list(value: object) -> tuple[str, ...]:
    """Return the captions in a list, without empty items; empty for a value that is not a list."""
    items = value if isinstance(value, list) else []
    return tuple(item.strip() for item in items if isinstance(item, str) and item.strip())


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
