"""Load a base where, and as precisely, as the command line asks."""

from __future__ import annotations

from typing import Any, Literal

from ...utils.errors import RestuneError


def load_placed(
    base: str,
    device: Literal["auto", "cpu", "cuda", "mps"],
    dtype: Literal["auto", "fp32", "fp16", "bf16"],
) -> Any:
    """Load a base as a pipeline that takes tuners.

    Args:
        base: a directory, or the id of a hub repository.
        device: where to compute; `auto` takes a GPU if there is one.
        dtype: precision; `auto` is fp16 on a GPU and fp32 on the CPU.

    Raises:
        RestuneError: if there is no such base or device.
    """
    import torch

    from ...pipelines.load_base import load_base

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise RestuneError("There is no CUDA device here; use --device cpu.")
    automatic = torch.float32 if device == "cpu" else torch.float16
    dtypes = {"auto": automatic, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return load_base(base, dtypes[dtype]).to(device)
