"""Image files given on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


def read_image(path: Path) -> Image.Image:
    """Read an image as RGB, or as RGBA if it has transparency.

    Raises:
        DataError: if the file cannot be read.
    """
    from ...data.image_files import read_layer
    from ...utils.errors import DataError

    try:
        return read_layer(path)[0]
    except Exception as error:  # Pillow's decoders raise almost anything on a broken file
        raise DataError(f"{path} cannot be read as an image ({error}).") from error


def fitted_image(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return an image resized to a width and height, and cropped around its center."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
