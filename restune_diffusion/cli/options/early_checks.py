"""Checks of paths and devices before the libraries are imported, which takes seconds."""

from __future__ import annotations

import ctypes
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ...storage.base_files.contents import kind_of
from ...storage.base_files.location import is_hub_id
from ...storage.base_files.tensor_header import read_tensor_header
from ...utils.errors import DataError, RestuneError, TrainingError, TunerFileError

_CUDA_LIBRARY = "libcuda.so.1"


def check_data(folder: Path, what: str = "image folder") -> None:
    """Raise `DataError` if a folder of images does not exist."""
    if not folder.exists():
        raise DataError(f"The {what} {folder} does not exist; give the path of a folder of images.")


def check_writable(folder: Path) -> None:
    """Check that files can be written to a folder, which need not exist yet.

    Raises:
        TrainingError: if the folder cannot be created or written to.
    """
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not existing.is_dir():
        raise TrainingError(
            f"The output folder {folder} cannot be created, because {existing} is a file; choose another."
        )
    try:
        # The permissions do not tell of a read-only disk, and mean nothing to an administrator.
        with tempfile.TemporaryDirectory(dir=existing, prefix=".restune-"):
            pass
    except OSError as error:
        raise TrainingError(
            f"The output folder {folder} cannot be written to ({error.strerror}); choose another, or change its "
            "permissions."
        ) from error


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


def check_precision(mixed_precision: str, *, cpu: bool) -> None:
    """Raise `TrainingError` if training in fp16 is requested on a machine without a GPU."""
    if mixed_precision == "fp16" and (cpu or not (has_cuda() or sys.platform == "darwin")):
        raise TrainingError("fp16 needs a GPU; train on the CPU in fp32 (mixed precision `no`) or bf16.")


def has_cuda() -> bool:
    """Return whether there can be a CUDA device, by torch's build and NVIDIA's driver; torch is not imported."""
    try:
        build = version("torch")
    except PackageNotFoundError:
        return True
    if "+cpu" in build or sys.platform == "darwin":
        return False
    if "+rocm" in build or sys.platform != "linux":
        return True
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL(_CUDA_LIBRARY)
        return not driver.cuInit(0) and not driver.cuDeviceGetCount(ctypes.byref(count)) and count.value > 0
    except (OSError, AttributeError):
        return False
