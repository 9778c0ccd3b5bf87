"""Record of how an image was generated, in its PNG file: JSON, and the text that A1111 and Civitai read.

A1111's format is that of `modules/infotext_utils.py` in AUTOMATIC1111/stable-diffusion-webui: the prompt, a line with
`Negative prompt:`, and a line of `key: value` pairs, whose values are quoted as JSON if they contain a comma, a colon
or a line break.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..utils.errors import DataError

JSON_CHUNK, A1111_CHUNK = "restune", "parameters"
_NEGATIVE = "Negative prompt:"
# A name, and a value up to the next comma or in quotation marks with JSON's escapes.
_NAME, _VALUE = r"\w[^:,\"\n]*", r"\"(?:[^\"\\]|\\.)*\"|[^,\n]*"
_PAIR = re.compile(rf"({_NAME}):[ ]*({_VALUE})(?:,[ ]*|$)")
_USER_COMMENT, _EXIF_IFD = 0x9286, 0x8769
# A line with fewer pairs belongs to the prompt.
_FEWEST_PAIRS = 3


@dataclass(frozen=True)
class GenerationRecord:
    """What an image file says about its generation."""

    facts: dict[str, Any]
    """Record of this package; empty if another program wrote the image."""
    text: str
    """A1111's text; empty if there is none."""


def png_chunks(facts: Mapping[str, Any], text: str) -> PngInfo:
    """Return the text chunks of a PNG file, for Pillow's `save(pnginfo=...)`."""
    chunks = PngInfo()
    # Pillow writes text beyond Latin-1 to an iTXt chunk, as A1111 does. JSON's escapes keep the other one in ASCII.
    chunks.add_text(A1111_CHUNK, text)
    chunks.add_text(JSON_CHUNK, json.dumps(facts))
    return chunks


def read_record(path: str | PathLike[str]) -> GenerationRecord:
    """Read the record of an image of this package or of A1111 (PNG, JPEG or WebP).

    Raises:
        DataError: if the file cannot be read as an image, or has no record.
    """
    try:
        with Image.open(path) as image:
            chunks = {key: str(value) for key, value in image.info.items() if key in (A1111_CHUNK, JSON_CHUNK)}
            text = text_of_image(image)
    except FileNotFoundError:
        raise DataError(f"There is no file {path}.") from None
    except Exception as error:  # Pillow's decoders raise almost anything on a broken file
        raise DataError(f"{path} cannot be read as an image ({error}).") from error
    try:
        facts = json.loads(chunks.get(JSON_CHUNK, "{}"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"The record of {path} is damaged ({error}); the image itself can be read.") from error
    facts = facts if isinstance(facts, dict) else {}
    if not facts and not text:
        raise DataError(
            f"{path} does not record how it was generated; images of `restune generate` and of A1111 do, unless "
            "another program has saved them again."
        )
    return GenerationRecord(facts, text)


def a1111_text(prompt: str, negative_prompt: str | None, pairs: Mapping[str, object]) -> str:
    """Return A1111's text.

    Args:
        prompt: the prompt.
        negative_prompt: the negative prompt.
        pairs: names and values of the last line; those with the value None are omitted.
    """
    lines = [prompt, f"{_NEGATIVE} {negative_prompt}" if negative_prompt else ""]
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items() if value is not None))
    return "\n".join(line for line in lines if line).strip()


def parse_a1111(infotext: str) -> tuple[str, str, dict[str, str]]:
    """Return prompt, negative prompt and the pairs of the last line of A1111's text."""
    *lines, last = infotext.strip().split("\n")
    pairs = _PAIR.findall(last)
    if len(pairs) < _FEWEST_PAIRS:
        lines, pairs = [*lines, last], []
    prompt: list[str] = []
    negative: list[str] = []
    target = prompt
    for line in lines:
        text = line.strip()
        if text.startswith(_NEGATIVE):
            target, text = negative, text.removeprefix(_NEGATIVE).strip()
        target.append(text)
    return "\n".join(prompt), "\n".join(negative), {key: _unquoted(value) for key, value in pairs}


def with_user_comment(text: str) -> Image.Exif:
    """Return EXIF data for a JPEG or WebP file, with A1111's text where A1111 stores it."""
    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    return exif


def text_of_image(image: Image.Image) -> str:
    """Return A1111's text of an open image; empty if it has none."""
    return str(image.info.get(A1111_CHUNK) or "") or _user_comment(image)


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(sign in text for sign in ",\n:") else text


def _unquoted(value: str) -> str:
    if len(value) < 2 or value[0] != '"' or value[-1] != '"':
        return value.strip()
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def _user_comment(image: Image.Image) -> str:
    """Return the EXIF comment, where A1111 stores its text in JPEG and WebP files."""
    comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    if not isinstance(comment, bytes):
        return ""
    code, content = comment[:8], comment[8:]
    if code.rstrip(b"\0") == b"UNICODE":
        return content.decode("utf-16-le" if content[1:2] == b"\0" else "utf-16-be", "replace").strip("\0")
    return content.decode("utf-8", "replace").strip("\0")
