"""Settings of the family `control`, and its registration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..registry import ConditionedConfig, register_lazy_tuner_family


class ControlConfig(ConditionedConfig):
    """CSC-Tuner on the skip connections of a U-Net: images steer what is drawn (SCEdit, arXiv 2312.11392).

    `O_j = x_j + sum_m alpha_m (T_j^m(x_j + c_j^m) + c_j^m)`, `c_j^m` the features of condition `m` at skip `j`.
    """

    part: Literal["control"] = "control"
    ratio: float = Field(default=1.0, gt=0, le=8)
    """Width of the bottleneck over the width of the skip feature."""
    level_kernel: Literal[1, 3] = 1
    """Kernel of the convolutions that carry the condition from one skip to the next."""
    shortcut: bool = True
    """Carry the condition past these convolutions too, which are zero at the start. The published encoder does not,
    and learns slowly."""


register_lazy_tuner_family(
    ControlConfig,
    "restune_diffusion.tuners.control:ControlPart",
    summary="Condition images steer the skip connections of a U-Net (CSC-Tuner of SCEdit).",
)
