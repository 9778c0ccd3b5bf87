"""Feature cache: the base's features of the training data, computed once, so that training never runs its blocks."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from ...backbones.site_names import OUT
from ...utils.atomic_write import atomic_write
from ...utils.display import readable_size
from ...utils.errors import TrainingError
from ..quantization import stored_tensors
from .layout import DTYPES, TIME, FeatureCacheLayout, Shard
from .tap_features import TapFeatures

Compute = Callable[[Shard], TapFeatures]
"""Computes the features of the draws in one file."""


class FeatureCache:
    """Features of a fixed number of draws (noise and timestep) of each image, in safetensors files.

    Files are written atomically. So an interrupted cache can be continued, and several processes can build shares of
    one cache.

    Args:
        parent: folder of feature caches; this one is in a subfolder named by a hash of its identity.
        layout: files and tensor shapes.
        identity: everything that the features depend on, as JSON values.

    Raises:
        TrainingError: if the subfolder contains another cache.
    """

    def __init__(self, parent: Path, layout: FeatureCacheLayout, identity: dict[str, Any]) -> None:
        self.layout = layout
        self._identity = json.dumps(identity, indent=2, sort_keys=True)
        self.folder = parent / hashlib.sha256(self._identity.encode()).hexdigest()[:16]
        file = self._identity_file
        if file.exists() and file.read_text(encoding="utf-8") != self._identity:
            raise TrainingError(f"{self.folder} holds features of other data or settings; delete it.")

    def missing(self, shards: Iterable[Shard] | None = None) -> list[Shard]:
        """Return the files, of `shards` or of the whole cache, that have not been computed."""
        wanted = self.layout.shards() if shards is None else shards
        return [shard for shard in wanted if not self._is_complete(shard)]

    def describe(self) -> str:
        """Return a line with the size of the cache, the size of the finished part, and the free disk space."""
        layout, missing = self.layout, sum(map(self.layout.bytes_of, self.missing()))
        return (
            f"{len(layout.sizes)} images x {layout.draws} noise samples in {layout.dtype} = "
            f"{readable_size(layout.bytes)} in {self.folder}, {readable_size(layout.bytes - missing)} of it computed, "
            f"{readable_size(self._free())} free"
        )

    def check_space(self) -> None:
        """Raise `TrainingError` if the missing files do not fit on the disk."""
        needed, free = sum(map(self.layout.bytes_of, self.missing())), self._free()
        if needed > free:
            raise TrainingError(
                f"The feature cache needs {readable_size(needed)} more in {self.folder.parent}, but only "
                f"{readable_size(free)} is free; lower --feature-cache (now {self.layout.draws}), or set "
                f"--feature-cache-dir to a folder on another disk."
            )

    def build(
        self, compute: Compute, share: int = 0, shares: int = 1, watch: Callable[[], object] | None = None
    ) -> None:
        """Compute the missing files of one share; call `watch` after each file of the share.

        Raises:
            TrainingError: if a feature is out of range for the cache's dtype.
            TunerFileError: if a file cannot be written.
        """
        if not self._identity_file.exists():
            with atomic_write(self._identity_file) as file:
                file.write(self._identity.encode())
        for shard in list(self.layout.shards())[share::shares]:
            if not self._is_complete(shard):
                self._write(shard, compute(shard))
            if watch is not None:
                watch()

    def read(self, entries: Sequence[tuple[int, int]]) -> TapFeatures:
        """Return the features of `(image, draw)` pairs, on the CPU in the cache's dtype.

        Raises:
            TrainingError: if a file is damaged or missing.
        """
        rows = [self._row(*entry) for entry in entries]
        by_site = {site: torch.stack([row[site] for row in rows]) for site in self.layout.stored}
        if self.layout.head_input in self.layout.taps:
            by_site[self.layout.head_input] = by_site[OUT]
        return TapFeatures(by_site, torch.stack([row[TIME] for row in rows]), self.layout.sizes[entries[0][0]])

    def _row(self, image: int, draw: int) -> dict[str, torch.Tensor]:
        shard, row = self.layout.place(image, draw)
        path = self.folder / shard.name
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_slice(name)[row] for name in (TIME, *self.layout.stored)}
        except (OSError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise TrainingError(
                f"{path} cannot be read ({reason}); delete it, and the next run computes it again."
            ) from error

    def _write(self, shard: Shard, features: TapFeatures) -> None:
        dtype = DTYPES[self.layout.dtype]
        assert features.time is not None
        stored = {TIME: features.time, **{site: features.by_site[site] for site in self.layout.stored}}
        tensors = {name: value.to("cpu", dtype).contiguous() for name, value in stored.items()}
        for name, value in tensors.items():
            if not bool(value.isfinite().all()):
                raise TrainingError(
                    f"The base's feature at {name} is out of range for {self.layout.dtype}; "
                    f"set --feature-cache-dtype to bf16 or fp32."
                )
        with atomic_write(self.folder / shard.name) as file:
            file.write(save(tensors))

    def _is_complete(self, shard: Shard) -> bool:
        try:
            with (self.folder / shard.name).open("rb") as file:
                header = int.from_bytes(file.read(8), "little")
                return file.seek(0, 2) == 8 + header + self.layout.bytes_of(shard)
        except OSError:
            return False

    def _free(self) -> int:
        folder = self.folder.absolute()
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    @property
    def _identity_file(self) -> Path:
        # File name of version 0.1, kept so that its caches are found.
        return self.folder / "bank.json"


def models_hash(models: Iterable[nn.Module]) -> str:
    """Return the SHA-256 of the models' parameters and buffers, with their names and dtypes."""
    content = hashlib.sha256()
    for model in models:
        for name, value in model.state_dict().items():
            content.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            for part in stored_tensors(value.detach()):
                content.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()
