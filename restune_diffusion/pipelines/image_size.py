"""Size of generated images: the base's native size, and the multiple that a pipeline requires."""

from __future__ import annotations

import math
from typing import Any

from ..utils.errors import RestuneError

_STEP = 8  # diffusers' pipelines refuse other sizes, whatever the autoencoder


def image_size(pipeline: Any, width: int | None, height: int | None) -> tuple[int, int]:
    """Return width and height of the images in pixels; a side that is not given has the base's native size.

    A call of diffusers' pipelines with only one side ignores it and uses the native size for both.

    Raises:
        RestuneError: if a side is not a multiple of what pipeline and autoencoder require.
    """
    native = pipeline.unet.config.sample_size
    native_height, native_width = (native, native) if isinstance(native, int) else native
    scale = pipeline.vae_scale_factor
    sides = {"width": width or native_width * scale, "height": height or native_height * scale}
    factor = math.lcm(_STEP, scale)
    for name, side in sides.items():
        if side % factor:
            below = side // factor * factor
            nearest = f"{below} or {below + factor}" if below else str(factor)
            raise RestuneError(
                f"A {name} of {side} does not fit this base; use a multiple of {factor}, for example {nearest}."
            )
    return sides["width"], sides["height"]
