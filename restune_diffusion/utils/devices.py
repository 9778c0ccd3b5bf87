"""Copies from the host to a device for which the host does not wait."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def sent(source: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device; a copy from the host to a CUDA device does not let the host wait.

    A copy from pageable memory waits until all work on the device is done, one from pinned memory does not.
    """
    if device.type == "cuda" and source.device.type == "cpu":
        return source.pin_memory().to(device, non_blocking=True)
    return source.to(device)


def overwrite(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy a tensor into another of the same shape; see `sent`."""
    if target.device.type == "cuda" and source.device.type == "cpu":
        # The dtype is converted on the device: on the host, the converted copy would not be pinned.
        source = sent(source, target.device)
    target.copy_(source)


@torch.no_grad()
def overwrite_all(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy each second tensor into the first of its pair; pageable memory takes one transfer for each dtype."""
    pageable: dict[tuple[torch.device, torch.dtype], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for target, source in pairs:
        if target.device.type == "cuda" and source.device.type == "cpu" and not source.is_pinned():
            pageable.setdefault((target.device, source.dtype), []).append((target, source))
        else:
            overwrite(target, source)
    for (device, dtype), group in pageable.items():
        total = sum(source.numel() for _, source in group)
        flat = torch.empty(total, dtype=dtype, pin_memory=True)
        torch.cat([source.flatten() for _, source in group], out=flat)
        pieces = flat.to(device, non_blocking=True).split([source.numel() for _, source in group])
        for (target, _), piece in zip(group, pieces, strict=True):
            target.copy_(piece.view(target.shape))
