"""Peak memory of a training run."""

from __future__ import annotations

import sys

import torch

if sys.platform != "win32":
    import resource


def reset_peak_memory(device: torch.device) -> None:
    """Start to measure the peak memory of a CUDA device; that of main memory always covers the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Return the peak memory of this process in bytes: of tensors on a CUDA device, otherwise of main memory.

    On CUDA it is that since `reset_peak_memory`, which each run calls before its first step.

    Return None on systems that do not report it (Windows).
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # getrusage(2): kilobytes on Linux, bytes on macOS
    return peak if sys.platform == "darwin" else peak * 1024
