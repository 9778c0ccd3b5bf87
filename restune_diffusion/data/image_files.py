"""Read pictures from files and cut them to what training sees."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps

from ..imaging.rgb import has_transparency, to_rgb, to_rgba
from ..utils.errors import DataError

_TOLERANCE = 0.02


@dataclass(frozen=True)
class SizeConditioning:
    """How an image was resized and cropped, in pixels as (height, width) or (top, left): what SDXL is told."""

    original: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True)
class Crop:
    """What of a picture training sees, in pixels: it is scaled, a rectangle is cut out, and perhaps mirrored.

    Sizes are (width, height), the corner (left, top), as Pillow has them.
    """

    scaled: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]
    mirrored: bool = False

    @property
    def slack(self) -> tuple[int, int]:
        """How far the corner may move to the right and down."""
        return self.scaled[0] - self.size[0], self.scaled[1] - self.size[1]

    def apply(self, image: Image.Image, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
        """Cut a picture, or a mask or condition that belongs to one and may be of another size."""
        (left, top), (width, height) = self.corner, self.size
        cut = image.resize(self.scaled, resample).crop((left, top, left + width, top + height))
        return ImageOps.mirror(cut) if self.mirrored else cut

    def size_conditioning(self, original: tuple[int, int]) -> SizeConditioning:
        """Return what SDXL is told about a picture of this original size, (width, height).

        A mirrored picture is one that was mirrored first and then cut, so its corner is told from the other side.
        """
        left, top = self.corner
        told = self.slack[0] - left if self.mirrored else left
        return SizeConditioning((original[1], original[0]), (top, told), (self.size[1], self.size[0]))


def centred(original: tuple[int, int], size: tuple[int, int]) -> Crop:
    """Scale a picture until it just covers a size, and keep the centre."""
    scale = max(size[0] / original[0], size[1] / original[1])
    scaled = max(size[0], round(original[0] * scale)), max(size[1], round(original[1] * scale))
    return Crop(scaled, ((scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2), size)


def same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Say whether two files of one picture, of these sizes, can show the same section; rounding alone may differ."""
    return abs(one[0] * other[1] / (one[1] * other[0]) - 1) <= _TOLERANCE


def read_layer(path: Path) -> tuple[Image.Image, bytes]:
    """Read an image upright, as RGBA if it is transparent and else as RGB, and the SHA-256 of its file."""
    return decode_layer(path.read_bytes())


def decode_layer(content: bytes) -> tuple[Image.Image, bytes]:
    """Read an encoded image upright, as RGBA if it is transparent and else as RGB, and the SHA-256 of its bytes.

    Of an animated image it is the first frame.

    Raises:
        DataError: if it holds floating-point numbers; said as the rest of a sentence that begins with the image.
    """
    with Image.open(BytesIO(content)) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
    if upright.mode == "F":
        raise DataError("holds floating-point numbers, of which none is known to be white; save it with 8 or 16 bits")
    layer = to_rgba(upright) if has_transparency(upright) else to_rgb(upright)
    return layer, hashlib.sha256(content).digest()


def read_image(path: Path) -> tuple[Image.Image, bytes]:
    """Read an image as upright RGB, with transparency laid on white, and the SHA-256 of its file."""
    layer, digest = read_layer(path)
    return to_rgb(layer), digest
