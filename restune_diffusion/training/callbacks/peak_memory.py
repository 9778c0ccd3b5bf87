"""How much memory a run has needed."""

from __future__ import annotations

import sys

import torch

if sys.platform != "win32":
    import resource


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes that this process has held so far: of tensors on a CUDA device, else of main memory.

    None where the system does not tell.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # getrusage(2): kilobytes on Linux, bytes on macOS
    return peak if sys.platform == "darwin" else peak * 1024
