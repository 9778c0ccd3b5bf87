"""Which file of a feature cache holds what, and how large it is: known before anything is computed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from ...backbones import BaseInfo
from ...backbones.site_names import OUT

BankDtype: TypeAlias = Literal["fp16", "bf16", "fp32"]
DTYPES: dict[BankDtype, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TIME = "time"
"""Name of the time embedding in a file."""

# Draws that are computed in one pass and lie in one file. A constant: a file is the same whoever makes it.
_DRAWS_OF_A_FILE = 4


@dataclass(frozen=True)
class Shard:
    """One file: `count` draws of one image from the `first` on."""

    image: int
    first: int
    count: int

    @property
    def name(self) -> str:
        """Its file name."""
        return f"{self.image:06d}-{self.first:04d}.safetensors"


@dataclass(frozen=True)
class BankLayout:
    """The shape of a bank.

    Args:
        base: structure of the base.
        taps: the sites that the tuners read.
        sizes: height and width of each image's latent.
        draws: draws of each image.
        dtype: dtype of all tensors.
    """

    base: BaseInfo
    taps: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    draws: int
    dtype: BankDtype

    @classmethod
    def of(
        cls, base: BaseInfo, taps: Collection[str], sizes: Sequence[tuple[int, int]], draws: int, dtype: BankDtype
    ) -> BankLayout:
        """Make a layout; the taps come in the order of the forward pass."""
        return cls(base, tuple(site for site in base.stations if site in taps), tuple(sizes), draws, dtype)

    @property
    def head_input(self) -> str:
        """The site whose feature enters the output head, under another name: the last before `out`."""
        return self.base.stations[-2]

    @property
    def stored(self) -> tuple[str, ...]:
        """The sites that are in the files; what is the same feature is there once."""
        return (*(site for site in self.taps if site != self.head_input), OUT)

    def shards(self) -> Iterator[Shard]:
        """Yield all files."""
        for image in range(len(self.sizes)):
            for first in range(0, self.draws, _DRAWS_OF_A_FILE):
                yield Shard(image, first, min(_DRAWS_OF_A_FILE, self.draws - first))

    def place(self, image: int, draw: int) -> tuple[Shard, int]:
        """Return the file that holds a draw of an image, and the row there."""
        first = draw - draw % _DRAWS_OF_A_FILE
        return Shard(image, first, min(_DRAWS_OF_A_FILE, self.draws - first)), draw - first

    def shapes(self, shard: Shard) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of a file."""
        height, width = self.sizes[shard.image]
        shapes: dict[str, tuple[int, ...]] = {TIME: (shard.count, self.base.time_channels)}
        for name in self.stored:
            site = self.base.sites[name]
            shapes[name] = (shard.count, site.channels, height // site.stride, width // site.stride)
        return shapes

    def bytes_of(self, shard: Shard) -> int:
        """Return the size of a file's tensors; its header, some two thousand bytes, comes on top."""
        numbers = sum(torch.Size(shape).numel() for shape in self.shapes(shard).values())
        return numbers * DTYPES[self.dtype].itemsize

    @property
    def bytes(self) -> int:
        """Size of all tensors of the bank."""
        return sum(self.bytes_of(shard) for shard in self.shards())
