"""Generated latents on disk, in safetensors files that an interrupted or another run continues from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ...utils.atomic_write import atomic_write

_LATENTS = "latents"


class LatentStore:
    """Latents in a subfolder that is named by a hash of everything they depend on, one file per generated batch.

    Args:
        parent: folder of all latents.
        identity: everything that the latents depend on, as JSON values.
    """

    def __init__(self, parent: Path, identity: dict[str, Any]) -> None:
        self._identity = json.dumps(identity, indent=2, sort_keys=True)
        self.folder = parent / hashlib.sha256(self._identity.encode()).hexdigest()[:16]

    def complete(
        self,
        batches: Sequence[Sequence[int]],
        generate: Callable[[Sequence[int]], torch.Tensor],
        watch: Callable[[int], object] | None = None,
    ) -> None:
        """Generate the batches that have no file.

        Args:
            batches: numbers of the latents of each batch.
            generate: generates the latents of a batch.
            watch: called with the size of each batch that is complete.

        Raises:
            TunerFileError: if a file cannot be written.
        """
        with atomic_write(self.folder / "latents.json") as file:
            file.write(self._identity.encode())
        for numbers in batches:
            if self._read(numbers) is None:
                latents = generate(numbers).float().cpu().contiguous()
                with atomic_write(self._path(numbers)) as file:
                    file.write(save({_LATENTS: latents}))
            if watch is not None:
                watch(len(numbers))

    def read(self, batches: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Return the latents of complete batches, on the CPU in fp32."""
        found = []
        for numbers in batches:
            latents = self._read(numbers)
            assert latents is not None
            found += list(latents)
        return found

    def _path(self, numbers: Sequence[int]) -> Path:
        return self.folder / f"latents-{numbers[0]:06d}.safetensors"

    def _read(self, numbers: Sequence[int]) -> torch.Tensor | None:
        """Return the latents of a batch; None if the file is missing, damaged, or of another batch."""
        try:
            with safe_open(self._path(numbers), framework="pt") as file:
                # Copied, because the tensor is mapped from the file.
                latents: torch.Tensor = file.get_tensor(_LATENTS).clone()
        except (OSError, SafetensorError):
            return None
        return latents if len(latents) == len(numbers) else None
