"""Context manager for the precision of the VAE."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def in_fp32(vae: Any) -> Iterator[None]:
    """Context manager that runs a VAE in fp32: SDXL's, and some of SD 1.5's, overflow to black images in fp16."""
    dtype = vae.dtype
    if dtype == torch.float32:
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(dtype)
