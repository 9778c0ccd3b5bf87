"""Read pictures from files and cut them to the square that training sees."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps

from ..images import has_transparency, to_rgb


@dataclass(frozen=True)
class Geometry:
    """How an image was resized and cropped, in pixels as (height, width) or (top, left): what SDXL is told."""

    original: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]


def read_layer(path: Path) -> tuple[Image.Image, bytes]:
    """Read an image upright, as RGBA if it is transparent and else as RGB, and the SHA-256 of its file."""
    content = path.read_bytes()
    with Image.open(BytesIO(content)) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
    layer = upright.convert("RGBA") if has_transparency(upright) else to_rgb(upright)
    return layer, hashlib.sha256(content).digest()


def read_image(path: Path) -> tuple[Image.Image, bytes]:
    """Read an image as upright RGB, with transparency laid on white, and the SHA-256 of its file."""
    layer, digest = read_layer(path)
    return to_rgb(layer), digest


def centre_square(image: Image.Image, resolution: int) -> tuple[Image.Image, Geometry]:
    """Scale the shorter side to the resolution and crop the centre square."""
    width, height = image.size
    scale = resolution / min(width, height)
    scaled = max(resolution, round(width * scale)), max(resolution, round(height * scale))
    left, top = (scaled[0] - resolution) // 2, (scaled[1] - resolution) // 2
    resized = image.resize(scaled, Image.Resampling.LANCZOS)
    square = resized.crop((left, top, left + resolution, top + resolution))
    return square, Geometry((height, width), (top, left), (resolution, resolution))
