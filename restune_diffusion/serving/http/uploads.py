"""Decode images of requests: limits are checked on the header, before a pixel is decoded."""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings
from typing import TYPE_CHECKING

from ...imaging.rgb import has_transparency, to_rgb, to_rgba
from ...imaging.upright import decode_upright
from .errors import RequestError
from .limits import Limits

if TYPE_CHECKING:
    from PIL import Image

_FORMATS = ("PNG", "JPEG", "WEBP")
_DATA_URL = re.compile(r"data:image/[\w.+-]{1,32};base64,")


def decode_image(content: bytes, limits: Limits, param: str) -> Image.Image:
    """Return an uploaded image, upright, in its own mode.

    Args:
        content: bytes of a PNG, JPEG or WebP file.
        limits: limits of the server.
        param: name of the request's parameter, for the message.

    Raises:
        RequestError: if the content is not such an image, is damaged, or has too many pixels.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            # Pillow warns of images that it takes for decompression bombs; the limit below is ours.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=_FORMATS) as header:
                if header.width * header.height > limits.image_pixels:
                    raise _too_large(limits, param)
                if getattr(header, "n_frames", 1) != 1:
                    raise RequestError(f"`{param}` is animated; send one frame.", param=param)
            return decode_upright(content)
    except RequestError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(limits, param) from None
    except Exception as error:  # Pillow's decoders raise almost anything on a broken file
        raise RequestError(
            f"`{param}` cannot be read as an image; send a PNG, JPEG or WebP file.", param=param
        ) from error


def _too_large(limits: Limits, param: str) -> RequestError:
    return RequestError(f"`{param}` has too many pixels; this server takes {limits.image_pixels}.", 413, param=param)


def decode_base64_image(text: str, limits: Limits, param: str) -> Image.Image:
    """Return an image that a request contains as base64, with or without `data:image/png;base64,` before it.

    Raises:
        RequestError: if the text is not base64, or the image is refused.
    """
    prefix = _DATA_URL.match(text[:64])
    try:
        content = base64.b64decode(text[prefix.end() :] if prefix else text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise RequestError(
            f"`{param}` is not a base64 string; encode the bytes of a PNG, JPEG or WebP file.", param=param
        ) from error
    return decode_image(content, limits, param)


def edit_mask(mask: Image.Image, image: Image.Image) -> Image.Image:
    """Return an OpenAI mask as a mask for inpainting: white where it is transparent, which is repainted.

    A mask without transparency is taken as it is: white is repainted.

    Raises:
        RequestError: if the mask has another size than the image, or no area to repaint.
    """
    from PIL import ImageOps

    if mask.size != image.size:
        raise RequestError(
            f"`mask` has {mask.width} x {mask.height} pixels and `image` {image.width} x {image.height}; send one of "
            "the image's size.",
            param="mask",
        )
    area = ImageOps.invert(to_rgba(mask).getchannel("A")) if has_transparency(mask) else to_rgb(mask).convert("L")
    if area.getextrema()[1] == 0:
        raise RequestError("`mask` has no transparent pixels; make the area to repaint transparent.", param="mask")
    return area


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return an image resized to a width and height, and cropped around its center."""
    from PIL import Image, ImageOps

    return image if image.size == size else ImageOps.fit(image, size, Image.Resampling.LANCZOS)
