"""Context manager for the precision of the VAE."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def encoding_precision(vae: Any) -> Iterator[None]:
    """Context manager that runs a VAE in fp32, or in fp16 if its config declares that fp16 is safe.

    SDXL's own VAE, and some of SD 1.5, overflow in fp16. `force_upcast` in the config marks them, and is true by
    default, as in diffusers. bf16 does not overflow, but its eight bits are too few for latents.
    """
    dtype = vae.dtype
    if dtype == torch.float32 or (dtype == torch.float16 and not vae.config.get("force_upcast", True)):
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(dtype)
