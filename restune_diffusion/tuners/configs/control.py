"""Settings and registration of the family `control`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..registry import ConditionedConfig, register_lazy_tuner_family


class ControlConfig(ConditionedConfig):
    """CSC-Tuner on the skip connections of a U-Net: generation controlled by images (SCEdit, arXiv 2312.11392).

    The output is `O_j = x_j + sum_m alpha_m (T_j^m(x_j + c_j^m) + c_j^m)`, where `c_j^m` are the features of condition
    m at skip j.
    """

    part: Literal["control"] = "control"
    ratio: float = Field(default=1.0, gt=0, le=8)
    """Width of the bottleneck, as a multiple of the width of the skip feature."""
    stem_ratio: float = Field(default=1.0, gt=0, le=16)
    """Width of the first convolutions on a condition image, as a multiple of the published widths, 16 to 96. The
    published tuners for SDXL have 2."""
    stem_channels: int = Field(default=256, gt=0, le=4096)
    """Width of the last of these convolutions. The published tuners for SDXL have 320."""
    level_kernel: Literal[1, 3] = 1
    """Kernel size of the convolutions that carry the condition from one skip to the next."""
    shortcut: bool = True
    """Add a shortcut around each of these convolutions, which are zero-initialized. The published encoder has none and
    learns slowly."""


register_lazy_tuner_family(
    ControlConfig,
    "restune_diffusion.tuners.control:ControlPart",
    summary="Control by condition images through the skip connections of a U-Net (CSC-Tuner of SCEdit).",
)
