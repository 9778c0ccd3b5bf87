"""Load a base on the device and with the dtype of the command line."""

from __future__ import annotations

from typing import Any, Literal

from ...utils.errors import RestuneError


def load_placed(
    base: str,
    device: Literal["auto", "cpu", "cuda", "mps"],
    dtype: Literal["auto", "fp32", "fp16", "bf16"],
    vae: str | None = None,
) -> Any:
    """Load a base as a pipeline that supports tuners.

    Args:
        base: a directory, or a hub repository id.
        device: compute device; `auto` uses a GPU if there is one.
        dtype: precision; `auto` is fp16 on a GPU and fp32 on the CPU.
        vae: VAE that replaces that of the base.

    Raises:
        RestuneError: if the base or the device does not exist.
    """
    import torch

    from ...pipelines.load_base import load_base

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise RestuneError("No CUDA device is available; use --device cpu.")
    automatic = torch.float32 if device == "cpu" else torch.float16
    dtypes = {"auto": automatic, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return load_base(base, dtypes[dtype], vae).to(device)
