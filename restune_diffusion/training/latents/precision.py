"""Precision of the VAE: for a while, or in a copy for the whole of training."""

from __future__ import annotations

import copy
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


def held_encoder(vae: Any) -> Any:
    """Return a VAE that can encode in every step without a cast of its weights.

    It is the VAE itself if its dtype is that of encoding, otherwise a copy in that dtype, without the decoder.
    """
    dtype = vae.dtype
    with encoding_precision(vae):
        if vae.dtype == dtype:
            return vae
        return copy.deepcopy(vae, {id(vae.decoder): None})
