"""Read training images and bring them to the size that the base trains at."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from .captions import Example

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Geometry:
    """How an image was resized and cropped, in pixels as (height, width) or (top, left): what SDXL is told."""

    original: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True)
class Sample:
    """A training image in [-1, 1], 3 x height x width, with its caption and the hash of its file."""

    pixels: torch.Tensor
    caption: str
    geometry: Geometry
    digest: bytes


def load_samples(examples: Sequence[Example], resolution: int) -> Iterator[Sample]:
    """Load one image after the other; name those that cannot be read in a warning and leave them out."""
    for example in examples:
        try:
            image, digest = read_image(example.path)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise almost anything on a broken file
            logger.warning("Skipped %s: it cannot be read as an image (%s).", example.path, error)
            continue
        pixels, geometry = fit(image, resolution)
        yield Sample(pixels, example.caption, geometry, digest)


def read_image(path: Path) -> tuple[Image.Image, bytes]:
    """Read an image as upright RGB, with transparency laid on white, and the SHA-256 of its file."""
    content = path.read_bytes()
    with Image.open(BytesIO(content)) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
    return to_rgb(upright), hashlib.sha256(content).digest()


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB; transparent pixels become white, 16-bit gray keeps its brightness."""
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit values at 255, which turns the image white.
        gray = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(gray.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, resolution: int) -> tuple[torch.Tensor, Geometry]:
    """Scale the shorter side to the resolution and crop the centre square."""
    width, height = image.size
    scale = resolution / min(width, height)
    scaled = max(resolution, round(width * scale)), max(resolution, round(height * scale))
    left, top = (scaled[0] - resolution) // 2, (scaled[1] - resolution) // 2
    resized = image.resize(scaled, Image.Resampling.LANCZOS)
    square = np.asarray(resized.crop((left, top, left + resolution, top + resolution)))
    pixels = torch.from_numpy(square.copy()).permute(2, 0, 1).float() / 127.5 - 1
    return pixels, Geometry((height, width), (top, left), (resolution, resolution))
