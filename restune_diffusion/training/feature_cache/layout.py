"""Layout of a feature cache: files, tensor shapes and sizes, all known before computing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from ...backbones import BaseInfo
from ...backbones.site_names import OUT

FeatureCacheDtype: TypeAlias = Literal["fp16", "bf16", "fp32"]
DTYPES: dict[FeatureCacheDtype, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TIME = "time"
"""Tensor name of the time embedding in a file."""

# Draws computed in one forward pass and stored in one file. A constant, so that files do not depend on the process.
_DRAWS_PER_FILE = 4


@dataclass(frozen=True)
class Shard:
    """One file: `count` draws of one image, starting with number `first`."""

    image: int
    first: int
    count: int

    @property
    def name(self) -> str:
        """File name."""
        return f"{self.image:06d}-{self.first:04d}.safetensors"


@dataclass(frozen=True)
class FeatureCacheLayout:
    """Files of a feature cache and the shapes of their tensors.

    Args:
        base: structure of the base.
        taps: sites that the tuners read.
        sizes: height and width of each image's latent.
        draws: draws (noise and timestep) per image.
        dtype: dtype of all tensors.
    """

    base: BaseInfo
    taps: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    draws: int
    dtype: FeatureCacheDtype

    @classmethod
    def of(
        cls,
        base: BaseInfo,
        taps: Collection[str],
        sizes: Sequence[tuple[int, int]],
        draws: int,
        dtype: FeatureCacheDtype,
    ) -> FeatureCacheLayout:
        """Return a layout with the taps in the order of the forward pass."""
        return cls(base, tuple(site for site in base.stations if site in taps), tuple(sizes), draws, dtype)

    @property
    def head_input(self) -> str:
        """Site whose feature is the input of the output head, the same as that of `out`: the last before `out`."""
        return self.base.stations[-2]

    @property
    def stored(self) -> tuple[str, ...]:
        """Sites stored in the files; a feature with two site names is stored once."""
        return (*(site for site in self.taps if site != self.head_input), OUT)

    def shards(self) -> Iterator[Shard]:
        """Yield all files of the cache."""
        for image in range(len(self.sizes)):
            for first in range(0, self.draws, _DRAWS_PER_FILE):
                yield Shard(image, first, min(_DRAWS_PER_FILE, self.draws - first))

    def place(self, image: int, draw: int) -> tuple[Shard, int]:
        """Return the file of a draw of an image, and its row in the file."""
        first = draw - draw % _DRAWS_PER_FILE
        return Shard(image, first, min(_DRAWS_PER_FILE, self.draws - first)), draw - first

    def shapes(self, shard: Shard) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of a file."""
        height, width = self.sizes[shard.image]
        shapes: dict[str, tuple[int, ...]] = {TIME: (shard.count, self.base.time_channels)}
        for name in self.stored:
            site = self.base.sites[name]
            shapes[name] = (shard.count, site.channels, height // site.stride, width // site.stride)
        return shapes

    def bytes_of(self, shard: Shard) -> int:
        """Return the size in bytes of a file's tensors, without its header of about 2000 bytes."""
        numbers = sum(torch.Size(shape).numel() for shape in self.shapes(shard).values())
        return numbers * DTYPES[self.dtype].itemsize

    @property
    def bytes(self) -> int:
        """Size in bytes of all tensors of the cache."""
        return sum(self.bytes_of(shard) for shard in self.shards())
