"""Thumbnails in the headers of tuner files."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

_SIDE = 256
_FIELD = "modelspec.thumbnail"


def data_url(image: Image.Image, side: int | None = None) -> str:
    """Return an image as the data URL of a WebP file.

    Args:
        image: the image.
        side: longer side; larger images are reduced to it.
    """
    shown = image.convert("RGB")
    if side is not None:
        shown.thumbnail((side, side))
    buffer = io.BytesIO()
    shown.save(buffer, "WEBP", quality=92)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def newest_sample(run: Path) -> str | None:
    """Return the first validation sample of the last step of a run as a thumbnail; None if there is none."""
    steps = sorted((run / "samples").glob("step-*"))
    for path in sorted(steps[-1].glob("*.png")) if steps else []:
        try:
            with Image.open(path) as image:
                return data_url(image, _SIDE)
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
    return None


def thumbnail_of(image: Image.Image) -> str:
    """Return a generated image as a thumbnail."""
    return data_url(image, _SIDE)


def with_metadata(source: Path, target: Path, *, thumbnail: str | None, title: str | None = None) -> None:
    """Write a tuner file again with a thumbnail and a title; its tensors and training facts stay as they are.

    Args:
        source: the tuner file.
        target: path to write to, which may be `source`.
        thumbnail: data URL of the thumbnail; None keeps that of the file.
        title: title; None keeps that of the file.

    Raises:
        RestuneError: if the file is damaged or cannot be written.
    """
    from ...storage.tuner_file import load_tuner, read_info, save_tuner

    info = read_info(source)
    kept = {key: value for key, value in info.metadata.items() if not key.startswith("restune.") and key != "format"}
    changes = {_FIELD: thumbnail, "modelspec.title": title}
    kept |= {key: value for key, value in changes.items() if value is not None}
    save_tuner(load_tuner(source), target, training=info.training or None, metadata=kept)
