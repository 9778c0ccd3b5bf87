"""A bank of what the base makes of the training data: computed once, after which its blocks never run."""

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
from .layout import DTYPES, TIME, BankLayout, Shard
from .tap_features import TapFeatures

Compute = Callable[[Shard], TapFeatures]
"""Makes the features of the draws of one file."""


class FeatureCache:
    """The features of some draws of each image, in safetensors files.

    Each file is written whole or not at all, so that an interrupted bank goes on where it was, and processes that
    build shares of one bank cannot harm each other.

    Args:
        parent: folder of banks; this one has a folder of its own there, named by its identity.
        layout: what is where.
        identity: all that the features depend on, as plain JSON values.

    Raises:
        TrainingError: if there is something else in this bank's folder.
    """

    def __init__(self, parent: Path, layout: BankLayout, identity: dict[str, Any]) -> None:
        self.layout = layout
        self._identity = json.dumps(identity, indent=2, sort_keys=True)
        self.folder = parent / hashlib.sha256(self._identity.encode()).hexdigest()[:16]
        facts = self._facts
        if facts.exists() and facts.read_text(encoding="utf-8") != self._identity:
            raise TrainingError(f"{self.folder} holds features of other data or settings; delete it.")

    def missing(self, shards: Iterable[Shard] | None = None) -> list[Shard]:
        """Return which of the files, or of all, are still to be made."""
        wanted = self.layout.shards() if shards is None else shards
        return [shard for shard in wanted if not self._is_there(shard)]

    def describe(self) -> str:
        """Say how much disk the bank takes, and how much of it is there already."""
        layout, missing = self.layout, sum(map(self.layout.bytes_of, self.missing()))
        return (
            f"{len(layout.sizes)} images x {layout.draws} draws in {layout.dtype} = {readable_size(layout.bytes)} in "
            f"{self.folder}, {readable_size(layout.bytes - missing)} of it are there, "
            f"{readable_size(self._free())} are free"
        )

    def check_space(self) -> None:
        """Raise `TrainingError` if what is missing does not fit on the disk."""
        needed, free = sum(map(self.layout.bytes_of, self.missing())), self._free()
        if needed > free:
            raise TrainingError(
                f"The feature cache needs {readable_size(needed)} more in {self.folder.parent}, where "
                f"{readable_size(free)} are free; lower --feature-cache (now {self.layout.draws}), or name a folder "
                f"on another disk by --feature-cache-dir."
            )

    def build(
        self, compute: Compute, share: int = 0, shares: int = 1, watch: Callable[[], object] | None = None
    ) -> None:
        """Make the missing files of one share; `watch` is called after each file of the share.

        Raises:
            TrainingError: if a feature is beyond the range of the bank's dtype.
            TunerFileError: if a file cannot be written.
        """
        if not self._facts.exists():
            with atomic_write(self._facts) as file:
                file.write(self._identity.encode())
        for shard in list(self.layout.shards())[share::shares]:
            if not self._is_there(shard):
                self._write(shard, compute(shard))
            if watch is not None:
                watch()

    def read(self, entries: Sequence[tuple[int, int]]) -> TapFeatures:
        """Return the features of draws, each an image and the number of the draw, on the CPU in the bank's dtype.

        Raises:
            TrainingError: if a file is damaged or gone.
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
                f"{path} cannot be read ({reason}); delete it, and the next start makes it anew."
            ) from error

    def _write(self, shard: Shard, features: TapFeatures) -> None:
        dtype = DTYPES[self.layout.dtype]
        assert features.time is not None
        stored = {TIME: features.time, **{site: features.by_site[site] for site in self.layout.stored}}
        tensors = {name: value.to("cpu", dtype).contiguous() for name, value in stored.items()}
        for name, value in tensors.items():
            if not bool(value.isfinite().all()):
                raise TrainingError(
                    f"The base's feature at {name} is beyond the range of {self.layout.dtype}; "
                    f"choose another --feature-cache-dtype, bf16 or fp32."
                )
        with atomic_write(self.folder / shard.name) as file:
            file.write(save(tensors))

    def _is_there(self, shard: Shard) -> bool:
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
    def _facts(self) -> Path:
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
