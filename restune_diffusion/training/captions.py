"""Find the images of a folder and the caption of each."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError

logger = logging.getLogger(__name__)

METADATA_FILE = "metadata.jsonl"
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})


@dataclass(frozen=True)
class Example:
    """An image file, its caption, and the files of images that steer it, by the condition's name or number."""

    path: Path
    caption: str
    conditions: Mapping[str | int, Path] = field(default_factory=dict)


def find_examples(folder: Path, prompt: str | None = None) -> list[Example]:
    """List the images of a folder with their captions, in an order that does not depend on the file system.

    Where there is a `metadata.jsonl`, its rows decide which images are used. Otherwise it is every image in the
    folder and below, each with the caption in the `.txt` beside it.

    Args:
        folder: the folder.
        prompt: caption of the images that have none of their own.

    Raises:
        DataError: if the folder has no images, an image has no caption, or `metadata.jsonl` has a fault.
    """
    if not folder.is_dir():
        raise DataError(f"The image folder {folder} does not exist; give the path of a folder of images.")
    images = list_images(folder)
    metadata = folder / METADATA_FILE
    if metadata.is_file():
        examples = _read_metadata(metadata, prompt)
        named = {path for example in examples for path in (example.path, *example.conditions.values())}
        unnamed = len(set(images) - named)
        if unnamed:
            logger.warning("%d images in %s are not used, because %s does not name them.", unnamed, folder, metadata)
    else:
        examples = [Example(path, _sidecar_caption(path, prompt)) for path in images]
    if not examples:
        raise DataError(f"The image folder {folder} has no images; put some PNG, JPEG or WebP files there.")
    return examples


def list_images(folder: Path) -> list[Path]:
    """List the image files of a folder and below, in an order that does not depend on the file system."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    # macOS and some editors leave hidden files that only look like images.
    visible = (path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    return sorted(visible, key=lambda path: path.relative_to(folder).as_posix())


def _sidecar_caption(path: Path, prompt: str | None) -> str:
    sidecar = path.with_suffix(".txt")
    own = _read_text(sidecar).strip() if sidecar.is_file() else ""
    if own or prompt:
        return own or prompt or ""
    raise DataError(
        f"The image {path} has no caption; write one to {sidecar.name} beside it, name it in {METADATA_FILE}, "
        f"or give one prompt for all."
    )


def _read_metadata(metadata: Path, prompt: str | None) -> list[Example]:
    lines = _read_text(metadata).splitlines()
    rows = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    return [_read_row(metadata, number, line, prompt) for number, line in rows]


def _read_row(metadata: Path, number: int, line: str, prompt: str | None) -> Example:
    place = f"{metadata} line {number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is not valid JSON ({error.msg} at column {error.colno}).") from error
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise DataError(f'{place} names no image; each line must look like {{"file_name": "a.png", "text": "..."}}.')
    caption = row.get("text") or prompt
    if not isinstance(caption, str) or not caption.strip():
        raise DataError(f'{place} has no caption; put it under "text", or give one prompt for all.')
    path = _named_file(metadata, place, row["file_name"])
    conditions = {key: _named_file(metadata, place, name) for key, name in _condition_names(place, row).items()}
    return Example(path, caption.strip(), conditions)


def _condition_names(place: str, row: Mapping[str, object]) -> dict[str | int, str]:
    """Read `"condition": "a.png"`, `"conditions": ["a.png", "b.png"]` or `"conditions": {"canny": "a.png"}`."""
    named = row.get("conditions") or row.get("condition") or {}
    listed = named if isinstance(named, list | dict) else [named]
    files: dict[str | int, object] = dict(listed if isinstance(listed, dict) else enumerate(listed))
    names = {key: name for key, name in files.items() if isinstance(name, str)}
    if len(names) != len(files):
        raise DataError(f'{place} has conditions that are no file names; write {{"condition": "a.png"}}.')
    return names


def _named_file(metadata: Path, place: str, name: str) -> Path:
    path = metadata.parent / name
    if not path.is_file():
        raise DataError(f"{place} names {name}, but there is no such file in {metadata.parent}.")
    return path


def _read_text(path: Path) -> str:
    try:
        # Notepad writes a byte order mark, which `utf-8` would leave in front of the first word.
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text; save it as UTF-8.") from error
