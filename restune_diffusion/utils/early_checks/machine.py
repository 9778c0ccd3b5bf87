"""Checks of the compute device before the libraries are imported."""

from __future__ import annotations

import ctypes
import sys
from importlib.metadata import PackageNotFoundError, version

from ..errors import TrainingError

_CUDA_LIBRARY = "libcuda.so.1"


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
