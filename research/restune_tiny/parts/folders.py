"""Atomic replacement of folders and files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from restune_diffusion.utils.atomic_write import atomic_write


def replace_folder(new: Path, folder: Path) -> None:
    """Replace a folder with a finished one by renaming."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def decoder_folder(work: Path) -> Path:
    """Return the folder of the VAE with the improved decoder, or of the normalized VAE before that stage."""
    improved = work / "vae-final"
    return improved if improved.exists() else work / "vae-normalised"


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file atomically."""
    with atomic_write(path) as file:
        file.write(save(dict(tensors)))
