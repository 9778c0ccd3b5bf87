"""Record of the files and rows of a data folder that are skipped, with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..utils.display import printable


@dataclass(frozen=True)
class Refused:
    """A skipped file or row.

    Attributes:
        name: the file, or the file and the line.
        reason: reason that continues a sentence starting with `name`.
        fault: True for an error in the data; False for a file that is not a training image.
    """

    name: str
    reason: str
    fault: bool = True

    def __str__(self) -> str:
        return printable(f"{self.name} {self.reason}.")

    def inside(self, folder: Path) -> Refused:
        """Return a copy with paths relative to a folder if they are inside it."""
        prefix = f"{folder}/"
        name = self.name[len(prefix) :] if self.name.startswith(prefix) else self.name
        return Refused(name, self.reason.replace(prefix, ""), self.fault)
