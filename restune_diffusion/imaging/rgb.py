"""Convert images of any mode to RGB or RGBA."""

from __future__ import annotations

import numpy as np
from PIL import Image


def has_transparency(image: Image.Image) -> bool:
    """Return whether an image has an alpha channel or a transparent color."""
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def to_rgba(image: Image.Image) -> Image.Image:
    """Convert any mode to RGBA; 16-bit gray keeps its brightness and its transparent value."""
    if not image.mode.startswith("I"):
        return image.convert("RGBA")
    opaque = np.asarray(image) != image.info.get("transparency")
    layer = to_rgb(image).convert("RGBA")
    layer.putalpha(Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8)))
    return layer


def to_rgb(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Convert any mode to RGB; transparent pixels become the background, 16-bit gray keeps its brightness."""
    if image.mode.startswith("I"):
        # Pillow's conversion clips 16-bit values at 255, which turns the image white.
        gray = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(gray.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if has_transparency(image):
        layer = image.convert("RGBA")
        behind = Image.new("RGBA", layer.size, (*background, 255))
        return Image.alpha_composite(behind, layer).convert("RGB")
    return image.convert("RGB")
