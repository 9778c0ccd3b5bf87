"""The precision that a model works in for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def in_fp32(vae: Any) -> Iterator[None]:
    """Let an autoencoder work in fp32 meanwhile: SDXL's, and some of SD 1.5's, overflow to black in fp16."""
    dtype = vae.dtype
    if dtype == torch.float32:
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(dtype)
