"""Settings and registration of the family `skip`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..registry import PartConfig, register_lazy_tuner_family


class SkipConfig(PartConfig):
    """SC-Tuner on the skip connections of a U-Net (SCEdit, arXiv 2312.11392).

    The output is `O_j = x_j + W_up GELU(W_down x_j)` at every position of every selected skip feature.
    """

    part: Literal["skip"] = "skip"
    ratio: float = Field(default=1.0, gt=0, le=8)
    """Width of the bottleneck, as a multiple of the width of the skip feature."""
    sites: tuple[str, ...] = ("skip.*",)
    """Patterns of the skip connections that get a tuner, for instance `skip.0-3` or `skip.*`."""
    grad_depth: int | None = Field(default=None, ge=1, le=64)
    """Tune only those of these skips that enter the last N up blocks; backpropagation stops there (as with the late
    layers of SHERL, ECCV 2024). Combined with a bypass, it sets the trade-off between least memory (bypass alone) and
    most capacity (no limit)."""


register_lazy_tuner_family(
    SkipConfig,
    "restune_diffusion.tuners.skip:SkipPart",
    summary="Bottleneck on each skip connection of a U-Net (SC-Tuner of SCEdit); the default.",
)
