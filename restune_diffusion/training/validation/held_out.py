"""Images that are held out of training, with their captions and encodings."""

from __future__ import annotations

from dataclasses import dataclass

from ...data.data_sheet import Entry
from ...data.example import Example
from ..latents.cache import Cache

VALIDATION_LOSS = "validation_loss"
"""Name of the mean loss of the held-out images."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out images; the three sequences have the same order.

    Attributes:
        examples: files and captions.
        entries: names, captions, sizes and hashes, as in the data sheet.
        cache: encodings; one view of each image, from its center crop.
    """

    examples: tuple[Example, ...]
    entries: tuple[Entry, ...]
    cache: Cache
