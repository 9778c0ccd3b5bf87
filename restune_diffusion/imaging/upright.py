"""Decode an image upright, without failing on metadata other than its orientation."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from io import BytesIO

from PIL import Image

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG = b"\x89PNG\r\n\x1a\n"
# Texts and color profiles, whose decompressed size Pillow limits; the decoded pixels do not depend on them.
_DESCRIPTIVE = frozenset({b"tEXt", b"zTXt", b"iTXt", b"iCCP"})


def decode_upright(content: bytes) -> Image.Image:
    """Decode an encoded image and apply its EXIF orientation; an animation is reduced to its first frame.

    Damaged EXIF data counts as upright. Text and color profiles of a PNG file that are too large for Pillow are
    skipped. Pillow's limit on the number of pixels stays in force.
    """
    try:
        return _decode(content)
    except ValueError:
        if not content.startswith(_PNG):
            raise
        return _decode(_without_descriptions(content))


def _decode(content: bytes) -> Image.Image:
    with Image.open(BytesIO(content)) as image:
        image.load()
        turn = _TURNS.get(_orientation(image))
        return image.copy() if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 0 if there is none."""
    try:
        return int(image.getexif().get(_ORIENTATION, 0))
    except MemoryError:
        raise
    except Exception:  # Pillow's parser raises almost anything on damaged EXIF data
        return 0


def _without_descriptions(content: bytes) -> bytes:
    kept = [chunk for kind, chunk in _chunks(content) if kind not in _DESCRIPTIVE]
    return _PNG + b"".join(kept)


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield type and bytes of each chunk of a PNG file."""
    place = len(_PNG)
    while place + 8 <= len(content):
        length = struct.unpack(">I", content[place : place + 4])[0]
        yield content[place + 4 : place + 8], content[place : place + length + 12]
        place += length + 12
