"""Edits of one caption: replacement, removal of tags, prefix and suffix."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...utils.errors import DataError


@dataclass(frozen=True)
class CaptionEdit:
    """Edits of a caption, in this order.

    Tags are what commas separate; they are compared without case and surrounding spaces.

    Attributes:
        find: text to replace; None for no replacement.
        replace: replacement; with `regex` it may refer to groups, as in `\\1`.
        regex: whether `find` is a regular expression of Python.
        remove_tags: tags to remove.
        remove_duplicate_tags: whether to remove repetitions of a tag; the first one stays.
        prefix: text to put before captions that do not start with it.
        suffix: text to put behind captions that do not end with it.
    """

    find: str | None = None
    replace: str = ""
    regex: bool = False
    remove_tags: tuple[str, ...] = ()
    remove_duplicate_tags: bool = False
    prefix: str = ""
    suffix: str = ""

    def __post_init__(self) -> None:
        if self.find == "":
            raise DataError("The text to find is empty; give some text, or use a prefix or suffix.")
        if self.find is None or not self.regex:
            return
        try:
            pattern = re.compile(self.find)
        except re.error as error:
            raise DataError(f"{self.find} is not a regular expression: {error}.") from error
        try:
            # A template is parsed when it is used for the first time.
            re.sub(f"{self.find}|", self.replace, "")
            pattern.sub(self.replace, "")
        except (re.error, IndexError) as error:
            raise DataError(f"The replacement {self.replace} does not fit {self.find}: {error}.") from error

    def __call__(self, caption: str) -> str:
        """Return the edited caption."""
        if self.find is not None and self.regex:
            caption = re.sub(self.find, self.replace, caption)
        elif self.find is not None:
            caption = caption.replace(self.find, self.replace)
        caption = self._without_tags(caption)
        if self.prefix and not caption.startswith(self.prefix):
            caption = self.prefix + caption
        if self.suffix and not caption.endswith(self.suffix):
            caption += self.suffix
        return caption

    def _without_tags(self, caption: str) -> str:
        tags = [tag.strip() for tag in caption.split(",")]
        removed = {_compared(tag) for tag in self.remove_tags}
        kept: list[str] = []
        seen: set[str] = set()
        for tag in tags:
            name = _compared(tag)
            if name not in removed and not (self.remove_duplicate_tags and name in seen):
                kept.append(tag)
            seen.add(name)
        # A caption without such tags stays as it is, with its spaces.
        return caption if len(kept) == len(tags) else ", ".join(kept)


def _compared(tag: str) -> str:
    return tag.strip().casefold()
