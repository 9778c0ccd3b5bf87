"""Settings of the family `skip`, and its registration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..registry import PartConfig, register_lazy_tuner_family


class SkipConfig(PartConfig):
    """SC-Tuner on the skip connections of a U-Net (SCEdit, arXiv 2312.11392).

    `O_j = x_j + W_up GELU(W_down x_j)` at every position of every selected skip feature.
    """

    part: Literal["skip"] = "skip"
    ratio: float = Field(default=1.0, gt=0, le=8)
    """Width of the bottleneck over the width of the skip feature."""
    sites: tuple[str, ...] = ("skip.*",)
    """Patterns of the sites that get a tuner, for instance `skip.0-3`; `SitePattern` says how they are written."""
    grad_depth: int | None = Field(default=None, ge=1, le=64)
    """Of these only the skips that the last so many up blocks take; gradients end there (as the late layers of SHERL,
    ECCV 2024). Beside a bypass it is the dial from least memory (bypass alone) to most capacity (no limit)."""


register_lazy_tuner_family(
    SkipConfig,
    "restune_diffusion.tuners.skip:SkipPart",
    summary="Bottleneck on each skip connection of a U-Net (SC-Tuner of SCEdit); the default.",
)
