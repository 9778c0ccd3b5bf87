"""Place of a tensor in a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Place:
    """Place of a tensor: its file and key, and the part of the stored tensor that it is.

    Attributes:
        file: safetensors file.
        key: name in the file.
        third: number of the third of the rows, of a tensor that is stored with two others; None for the whole.
        transposed: whether the stored matrix is the transpose.
    """

    file: Path
    key: str
    third: int | None = None
    transposed: bool = False

    def of(self, stored: torch.Tensor) -> torch.Tensor:
        """Return the tensor from the stored one."""
        if self.third is not None:
            stored = stored.chunk(3)[self.third]
        return stored.T if self.transposed else stored
