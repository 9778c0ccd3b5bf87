"""Checks of paths and devices before the libraries are imported, which takes seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from ...storage.base_files.contents import kind_of
from ...storage.base_files.location import is_hub_id
from ...storage.base_files.tensor_header import read_tensor_header
from ...utils.early_checks.folders import check_data, check_writable
from ...utils.early_checks.machine import check_precision, has_cuda
from ...utils.errors import RestuneError, TunerFileError

__all__ = [
    "check_data",
    "check_device",
    "check_exists",
    "check_precision",
    "check_tuners",
    "check_writable",
    "has_cuda",
]


def check_exists(paths: Iterable[str], what: str = "tuner") -> None:
    """Raise `TunerFileError` if a file does not exist; an id on the Hub is not looked up."""
    for path in paths:
        if not Path(path).expanduser().exists() and not is_hub_id(path):
            raise TunerFileError(
                f"There is no {what} at {path}; give a safetensors file, its folder, or a repository id on the Hub."
            )


def check_tuners(paths: Iterable[str]) -> None:
    """Raise `TunerFileError` if a file does not exist, or is something else than a tuner of this package.

    Damaged files are left to the reader of tuner files.
    """
    for path in paths:
        check_exists([path])
        file = Path(path).expanduser()
        if not file.is_file():
            continue
        try:
            header = read_tensor_header(file)
        except RestuneError:
            continue
        if "restune.format_version" not in header.metadata:
            kind = kind_of(header)
            remedy = "convert it first: restune convert" if kind.startswith("a L") else "give a file of restune train"
            raise TunerFileError(f"{path} is {kind}, not a tuner of restune-diffusion; {remedy}.")


def check_device(device: str) -> None:
    """Raise `RestuneError` if a compute device cannot exist on this machine."""
    if device == "cuda" and not has_cuda():
        raise RestuneError("No CUDA device is available; use --device cpu.")
    if device == "mps" and sys.platform != "darwin":
        raise RestuneError("No Apple GPU is available, so --device mps is not; use --device cpu.")
