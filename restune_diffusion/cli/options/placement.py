"""Load a base on the device and with the dtype of the command line."""

from __future__ import annotations

from typing import Any, Literal


def load_placed(
    base: str,
    device: Literal["auto", "cpu", "cuda", "mps"],
    dtype: Literal["auto", "fp32", "fp16", "bf16"],
    vae: str | None = None,
) -> Any:
    """Call `pipelines.load_base.load_placed`, which imports torch."""
    from ...pipelines.load_base import load_placed

    return load_placed(base, device, dtype, vae)
