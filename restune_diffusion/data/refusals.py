"""What of a data folder is not trained on, and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..utils.display import printable


@dataclass(frozen=True)
class Refused:
    """A file or a row that is left out.

    Attributes:
        name: the file, or the file and its line.
        reason: why, as the rest of a sentence that begins with the name.
        fault: whether something is wrong; a file that was not meant to be trained on is merely named.
    """

    name: str
    reason: str
    fault: bool = True

    def __str__(self) -> str:
        return printable(f"{self.name} {self.reason}.")

    def inside(self, folder: Path) -> Refused:
        """Return the same with the name relative to a folder, where it lies inside."""
        prefix = f"{folder}/"
        name = self.name[len(prefix) :] if self.name.startswith(prefix) else self.name
        return Refused(name, self.reason.replace(prefix, ""), self.fault)
