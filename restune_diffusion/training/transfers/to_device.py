"""Copy from the host to a CUDA device without a wait."""

from __future__ import annotations

import torch


def to_device(value: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a tensor on a device, in a dtype (None: its own).

    A copy from ordinary memory waits until the device has finished all work before it. A copy from pinned memory does
    not, if the dtype is converted first.
    """
    if device.type != "cuda" or value.device.type != "cpu":
        return value.to(device, dtype or value.dtype)
    return value.to(dtype or value.dtype).pin_memory().to(device, non_blocking=True)
