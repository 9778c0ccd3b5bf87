"""Folders and files that a reader finds whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from restune_diffusion.utils.atomic_write import atomic_write


def replace_folder(new: Path, folder: Path) -> None:
    """Put a finished folder in another's place; a reader finds one of the two."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def decoder_folder(work: Path) -> Path:
    """The autoencoder with the best decoder there is."""
    improved = work / "vae-final"
    return improved if improved.exists() else work / "vae-normalised"


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file that is complete or absent."""
    with atomic_write(path) as file:
        file.write(save(dict(tensors)))
