"""Image files as Pillow images: upright, in RGB or RGBA."""

from __future__ import annotations

import hashlib
from pathlib import Path

from PIL import Image, ImageOps

from ..utils.errors import DataError
from .rgb import has_transparency, to_rgb, to_rgba
from .upright import decode_upright


def read_layer(path: Path) -> tuple[Image.Image, bytes]:
    """Return an image file as RGBA if it has transparency, otherwise as RGB, and the SHA-256 of its file.

    The EXIF rotation is applied. For errors see `decode_layer`.
    """
    return decode_layer(path.read_bytes())


def decode_layer(content: bytes) -> tuple[Image.Image, bytes]:
    """Return an encoded image as RGBA if it has transparency, otherwise as RGB, and the SHA-256 of its bytes.

    The EXIF rotation is applied. An animated image is reduced to its first frame.

    Raises:
        DataError: if the image has floating-point pixels. The message continues a sentence that starts with the name
            of the image.
    """
    upright = decode_upright(content)
    if upright.mode == "F":
        raise DataError("has floating-point pixels, whose value range is unknown; save it with 8 or 16 bits")
    layer = to_rgba(upright) if has_transparency(upright) else to_rgb(upright)
    return layer, hashlib.sha256(content).digest()


def open_image(path: Path) -> Image.Image:
    """Read an image as RGB, or as RGBA if it has transparency.

    Raises:
        DataError: if the file cannot be read.
    """
    try:
        return read_layer(path)[0]
    except Exception as error:  # Pillow's decoders raise almost anything on a broken file
        raise DataError(f"{path} cannot be read as an image ({error}).") from error


def fitted_image(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return an image resized to a width and height, and cropped around its center."""
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
