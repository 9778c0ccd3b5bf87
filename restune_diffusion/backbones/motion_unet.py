"""AnimateDiff's `UNetMotionModel`: the U-Net of Stable Diffusion with motion modules between its layers."""

from __future__ import annotations

from typing import Any

from .description import BaseInfo
from .structure import Call
from .unet import UNetStructure


class MotionUNetStructure(UNetStructure):
    """The sites of the U-Net that a motion U-Net was made from: it takes the same tuners, on every frame."""

    class_name = "UNetMotionModel"

    def describe(self, base: Any) -> BaseInfo:
        """Describe the U-Net that this was made from, as `UNetMotionModel.from_unet2d` names its blocks."""
        described = super().describe(base)
        structure = {
            **described.structure,
            **{
                key: [name.replace("Motion", "2D") for name in described.structure[key]]
                for key in ("down_block_types", "up_block_types")
            },
            "mid_block_type": "UNetMidBlock2DCrossAttn",
        }
        return described.model_copy(update={"denoiser": UNetStructure.class_name, "structure": structure})

    def call(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Read the batch off a `sample` of shape `(batch, channels, frames, height, width)`."""
        sample = args[0] if args else kwargs["sample"]
        return super().call(base, args, kwargs)._replace(frames=sample.shape[2])
