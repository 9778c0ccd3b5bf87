"""Inputs of modules that may run under autocast."""

from __future__ import annotations

import torch


def as_input(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `x` in the dtype of the module that reads it; under autocast unchanged.

    Autocast casts the inputs of each operation. A cast to fp32 before it would be undone.
    """
    return x if x.dtype == dtype or torch.is_autocast_enabled(x.device.type) else x.to(dtype)
