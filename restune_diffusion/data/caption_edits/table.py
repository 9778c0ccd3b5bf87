"""The captions of a folder as a table: read it, and write the rows that changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...utils.errors import DataError
from ..conventions.caption_files import CaptionFiles
from ..example import check_caption
from ..files import is_image, list_files, read_text
from ..refusals import Refused
from .editable import editable_folder
from .folder import Change, EditPlan


@dataclass(frozen=True)
class CaptionTable:
    """Captions of the images of a folder.

    Attributes:
        folder: the data folder.
        captions: caption by the image's path relative to the folder, with `/`; empty for an image without one.
        metadata: the file `metadata.jsonl` that has the captions, or None for caption files beside the images.
        refused: caption files and rows that cannot be read, with the reason.
    """

    folder: Path
    captions: Mapping[str, str]
    metadata: Path | None
    refused: tuple[Refused, ...] = ()

    @property
    def without(self) -> int:
        """Number of images without a caption."""
        return sum(not caption for caption in self.captions.values())


def read_table(folder: Path, caption_column: str = "text") -> CaptionTable:
    """Return the captions of a folder, without the trigger word and the template of a run.

    Args:
        folder: folder with `metadata.jsonl`, or with caption files beside its images.
        caption_column: key of the captions in `metadata.jsonl`.

    Raises:
        DataError: if the folder does not exist, or has its captions in a place that cannot be edited.
    """
    found = editable_folder(folder)
    captions: dict[str, str] = {}
    if found.metadata is not None:
        for line in read_text(found.metadata).split("\n"):
            row = _row(line)
            if row is not None and (name := _image_of(folder, found.metadata, row)) is not None:
                captions[name] = _caption_of(row, caption_column)
        return CaptionTable(folder, captions, found.metadata, tuple(found.refused))
    sidecars = CaptionFiles(found.files)
    for image in found.images:
        sidecar = sidecars.of(image)
        try:
            captions[_name(folder, image)] = "" if sidecar is None else read_text(sidecar).strip()
        except DataError as error:
            found.refused.append(Refused(str(sidecar), f"is left as it is: {str(error).rstrip('.')}"))
    return CaptionTable(folder, captions, None, tuple(found.refused))


def plan_table(table: CaptionTable, captions: Mapping[str, str], caption_column: str = "text") -> EditPlan:
    """Return what has to be written so that images have other captions.

    Args:
        table: the captions as they were read.
        captions: caption by image; images that are not named keep theirs.
        caption_column: key of the captions in `metadata.jsonl`.

    Raises:
        DataError: if an image is not in the table, or a caption cannot be written.
    """
    changed = {}
    for name, caption in captions.items():
        if name not in table.captions:
            raise DataError(f"{name} is not an image of {table.folder.name}; read the folder again.")
        text = caption.strip()
        try:
            check_caption(text)
        except DataError as error:
            raise DataError(f"{name} {error}.") from error
        if text != table.captions[name]:
            changed[name] = text
    plan = EditPlan(table.folder, captions=len(table.captions), refused=list(table.refused))
    plan.changes += [Change(name, table.captions[name], text) for name, text in changed.items()]
    if table.metadata is not None and changed:
        before = table.metadata.read_bytes()
        plan.contents[table.metadata] = (before, _edited(table, before, changed, caption_column))
    elif changed:
        sidecars = CaptionFiles(list_files(table.folder, []))
        for name, text in changed.items():
            image = table.folder / name
            path = sidecars.of(image) or _new_file(image)
            plan.contents[path] = (path.read_bytes() if path.exists() else None, text.encode())
    return plan


def _edited(table: CaptionTable, before: bytes, changed: Mapping[str, str], column: str) -> bytes:
    assert table.metadata is not None
    lines = before.decode("utf-8").split("\n")
    for number, line in enumerate(lines):
        mark = "\ufeff" if line.startswith("\ufeff") else ""
        row = _row(line.removeprefix(mark))
        name = None if row is None else _image_of(table.folder, table.metadata, row)
        if row is not None and name is not None and name in changed:
            row[column] = _replaced(row.get(column), changed[name])
            end = "\r" if line.endswith("\r") else ""
            lines[number] = mark + json.dumps(row, ensure_ascii="\\u" in line) + end
    return "\n".join(lines).encode()


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("file_name"), str) else None


def _caption_of(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if isinstance(value, list):
        value = next((each for each in value if isinstance(each, str) and each.strip()), "")
    return value.strip() if isinstance(value, str) else ""


def _replaced(value: object, caption: str) -> object:
    """Return a value of a row with another caption; of a list of captions, the first one is the caption."""
    if not isinstance(value, list):
        return caption
    first = next((number for number, each in enumerate(value) if isinstance(each, str) and each.strip()), 0)
    return [*value[:first], caption, *value[first + 1 :]]


def _image_of(folder: Path, metadata: Path, row: Mapping[str, Any]) -> str | None:
    """Return the name of the image of a row, or None if there is no such file in the folder."""
    path = metadata.parent / row["file_name"].replace("\\", "/")
    inside = path.is_relative_to(folder) and ".." not in path.parts
    return _name(folder, path) if inside and path.is_file() else None


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _new_file(image: Path) -> Path:
    """Return the path of a new caption file: by the stem, or the full name if another image has the same stem."""
    twins = [path for path in image.parent.iterdir() if path != image and path.stem == image.stem and is_image(path)]
    return image.with_name(f"{image.name}.txt") if twins else image.with_suffix(".txt")
