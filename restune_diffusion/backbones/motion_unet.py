"""AnimateDiff's `UNetMotionModel`: the U-Net of Stable Diffusion with motion modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .description import BaseInfo, Site
from .structure import Call
from .unet import UNetStructure


class MotionUNetStructure(UNetStructure):
    """Structure of a motion U-Net: it has the sites of its 2D U-Net and takes the same tuners, on every frame."""

    class_name = "UNetMotionModel"

    def sites(self, base: Any) -> Iterator[tuple[str, Site]]:
        """Yield the sites of the 2D U-Net, except its embeddings, which are computed once for all frames."""
        return ((name, site) for name, site in super().sites(base) if name not in ("time", "added"))

    def describe(self, base: Any) -> BaseInfo:
        """Return the description of the 2D U-Net, undoing the block names of `UNetMotionModel.from_unet2d`."""
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
        """Return batch, frames, latent size and timestep; `sample` is `(batch, channels, frames, height, width)`."""
        sample = args[0] if args else kwargs["sample"]
        return super().call(base, args, kwargs)._replace(frames=sample.shape[2])
