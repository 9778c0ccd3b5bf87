"""Precision of the VAE: for a while, or in a copy for the whole of training."""

from __future__ import annotations

import copy
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


def held_encoder(vae: Any) -> Any:
    """Return a VAE that can encode in every step without a cast of its weights.

    It is the VAE itself if its dtype is that of encoding, otherwise a copy in that dtype, without the decoder.
    """
    dtype = vae.dtype
    with in_fp32(vae):
        if vae.dtype == dtype:
            return vae
        return copy.deepcopy(vae, {id(vae.decoder): None})
