"""Inpainting as A1111 defines it: blurred mask, filled area, and repainting of a crop at full resolution."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, ImageFilter, ImageOps

from ....imaging.rgb import has_transparency, to_rgb, to_rgba
from ..bodies import Img2ImgBody
from ..errors import RequestError

_CROP = 1
_RADII = (64, 16, 4, 1)
_ORIGINAL = 1


@dataclass(frozen=True)
class Repaint:
    """Area of an image to repaint."""

    original: Image.Image
    """The whole image."""
    image: Image.Image
    """Image for the engine, of the generated size."""
    mask: Image.Image
    """Mask for the engine: white is repainted."""
    box: tuple[int, int, int, int] | None
    """Area of the original that the engine's image shows; None is the whole image."""
    whole_mask: Image.Image
    """Mask of the size of the original."""

    def pasted(self, result: Image.Image) -> Image.Image:
        """Return the original with the generated area in it; the generated image if the whole image was repainted."""
        if self.box is None:
            return result
        left, top, right, bottom = self.box
        layer = self.original.copy()
        layer.paste(result.resize((right - left, bottom - top), Image.Resampling.LANCZOS), (left, top))
        return Image.composite(layer, self.original, self.whole_mask)


def repaint(image: Image.Image, mask: Image.Image, body: Img2ImgBody, size: tuple[int, int]) -> Repaint:
    """Return the area to repaint.

    Args:
        image: the whole image, in RGB.
        mask: the mask: white, or opaque if it has transparency, is repainted.
        body: the request.
        size: width and height of the generated image.

    Raises:
        RequestError: if the mask is empty.
    """
    gray = to_rgb(mask, (0, 0, 0)).convert("L") if not _is_alpha_mask(mask) else to_rgba(mask).getchannel("A")
    gray = gray.resize(image.size, Image.Resampling.BILINEAR) if gray.size != image.size else gray
    if body.inpainting_mask_invert:
        gray = ImageOps.invert(gray)
    if body.mask_blur:
        gray = gray.filter(ImageFilter.GaussianBlur(body.mask_blur))
    box = gray.point([0] * 2 + [255] * 254).getbbox()
    if box is None:
        raise RequestError("The mask is empty; paint the area to change white.", param="mask")
    area = _crop_box(box, image.size, size, body.inpaint_full_res_padding or 0) if body.inpaint_full_res else None
    filled = image if body.inpainting_fill == _ORIGINAL else fill_area(image, gray)
    mode = body.resize_mode
    return Repaint(image, _resized(filled, area, size, mode), _resized(gray, area, size, mode), area, gray)


def fill_area(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Return an image whose white area of the mask is filled with the blurred colors around it."""
    kept = image.convert("RGBA")
    kept.putalpha(ImageOps.invert(mask))
    # Colors multiplied by their weight, so that a blur spreads only those that are kept.
    weighted = kept.convert("RGBa")
    filled = image.filter(ImageFilter.GaussianBlur(_RADII[0])).convert("RGBA")
    for radius in _RADII:
        filled.alpha_composite(weighted.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA"))
    filled.alpha_composite(kept)
    return filled.convert("RGB")


def _is_alpha_mask(mask: Image.Image) -> bool:
    """Return whether the alpha channel is the mask: A1111's clients send white or black images with transparency."""
    return has_transparency(mask) and min(to_rgba(mask).getchannel("A").tobytes(), default=255) < 255


def _crop_box(
    box: tuple[int, int, int, int], whole: tuple[int, int], size: tuple[int, int], padding: int
) -> tuple[int, int, int, int]:
    """Return the box with its padding, widened to the proportions of the generated image where there is room."""
    left, top = max(box[0] - padding, 0), max(box[1] - padding, 0)
    right, bottom = min(box[2] + padding, whole[0]), min(box[3] + padding, whole[1])
    width, height = right - left, bottom - top
    wanted = size[0] / size[1]
    if width / height < wanted:
        left, right = _widened(left, right, min(round(height * wanted), whole[0]), whole[0])
    else:
        top, bottom = _widened(top, bottom, min(round(width / wanted), whole[1]), whole[1])
    return left, top, right, bottom


def _widened(start: int, end: int, length: int, limit: int) -> tuple[int, int]:
    start = min(max(start - (length - (end - start)) // 2, 0), limit - length)
    return start, start + length


def _resized(
    image: Image.Image, box: tuple[int, int, int, int] | None, size: tuple[int, int], mode: int | None
) -> Image.Image:
    return resized(image, size, mode) if box is None else image.crop(box).resize(size, Image.Resampling.LANCZOS)


def resized(image: Image.Image, size: tuple[int, int], mode: int | None) -> Image.Image:
    """Return an image of another size, stretched or cropped.

    Args:
        image: the image.
        size: width and height.
        mode: A1111's `resize_mode`: 0 stretches, 1 crops.
    """
    if image.size == size:
        return image
    if mode == _CROP:
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    return image.resize(size, Image.Resampling.LANCZOS)
