"""Suffixes of image files: those that Pillow can open, and those that need another package."""

from __future__ import annotations

import warnings
from functools import cache

from PIL import Image, ImageFile

# Formats that Pillow identifies but decodes only with another program, or not at all.
_UNDECODED = frozenset({"EPS", "MPEG"})
_HEIF = frozenset({".heic", ".heics", ".heif", ".heifs", ".hif"})


@cache
def readable_suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case, of the image formats that can be read here; HEIF with the extra `heif`."""
    Image.init()
    _register_heif()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if _decodes(name))


def missing_reader(suffix: str) -> str | None:
    """Return why images of a suffix cannot be read here, continuing a sentence that starts with the file's name."""
    suffix = suffix.lower()
    if suffix in readable_suffixes():
        return None
    if suffix in _HEIF:
        return "is a HEIF image; run pip install 'restune-diffusion[heif]' to read it, or save it as PNG"
    return "is an AVIF image, which this Pillow cannot read; update Pillow" if suffix == ".avif" else None


def _decodes(name: str) -> bool:
    if name not in Image.OPEN or name in _UNDECODED:
        return False
    factory = Image.OPEN[name][0]
    return not (isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile))


def _register_heif() -> None:
    try:
        import pillow_heif
    except ImportError:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pillow_heif.register_heif_opener()
