"""Read image files and crop them to the training size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from ..imaging.image_files import read_layer
from ..imaging.rgb import to_rgb

_TOLERANCE = 0.02


@dataclass(frozen=True)
class SizeConditioning:
    """SDXL's size conditioning: original size, crop corner and target size of an image.

    Values are pixels, as (height, width) or (top, left).
    """

    original: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True)
class Crop:
    """A resize, a crop rectangle and an optional horizontal flip, in pixels.

    Sizes are (width, height) and the corner is (left, top), as in Pillow.
    """

    scaled: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]
    mirrored: bool = False

    @property
    def slack(self) -> tuple[int, int]:
        """Largest offset of the corner to the right and down."""
        return self.scaled[0] - self.size[0], self.scaled[1] - self.size[1]

    def apply(self, image: Image.Image, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
        """Return the crop of an image, or of its mask or condition image, whose size may differ from the image's."""
        (left, top), (width, height) = self.corner, self.size
        cropped = image.resize(self.scaled, resample).crop((left, top, left + width, top + height))
        return ImageOps.mirror(cropped) if self.mirrored else cropped

    def size_conditioning(self, original: tuple[int, int]) -> SizeConditioning:
        """Return the size conditioning for an image of this original size, (width, height).

        A mirrored crop counts as mirrored before cropping, so its left offset is measured from the right edge.
        """
        left, top = self.corner
        offset = self.slack[0] - left if self.mirrored else left
        return SizeConditioning((original[1], original[0]), (top, offset), (self.size[1], self.size[0]))


def centred(original: tuple[int, int], size: tuple[int, int]) -> Crop:
    """Return the center crop of an image that is scaled to just cover a size; sizes are (width, height)."""
    scale = max(size[0] / original[0], size[1] / original[1])
    scaled = max(size[0], round(original[0] * scale)), max(size[1], round(original[1] * scale))
    return Crop(scaled, ((scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2), size)


def same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether two sizes (width, height) have the same aspect ratio, up to rounding."""
    return abs(one[0] * other[1] / (one[1] * other[0]) - 1) <= _TOLERANCE


def read_image(path: Path) -> tuple[Image.Image, bytes]:
    """Return an image file as RGB with EXIF rotation applied and transparency over white, and its file's SHA-256."""
    layer, digest = read_layer(path)
    return to_rgb(layer), digest
