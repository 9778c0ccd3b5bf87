"""Read the metadata file of an image folder: `metadata.jsonl`, or `metadata.csv` with the same columns."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ..utils.errors import DataError
from .example import Example, check_caption
from .files import is_file, read_text
from .refusals import Refused

METADATA_FILE = "metadata.jsonl"
METADATA_CSV = "metadata.csv"

Row = tuple[str, object]
"""Where a row stands in its file, and what it holds."""


def read_metadata(
    metadata: Path,
    fallback: Callable[[Path], str | None],
    refused: list[Refused],
    caption_column: str = "text",
) -> list[Example]:
    """Read the rows of a metadata file; those that have a fault are refused, also a last one that is half written.

    Args:
        metadata: the file.
        fallback: caption of an image that has none in its row.
        refused: takes the rows that are left out.
        caption_column: the column, or key, with the captions.

    Raises:
        DataError: if the file cannot be read at all.
    """
    examples = []
    rows = _csv_rows if metadata.suffix == ".csv" else _json_rows
    for place, row in rows(metadata, refused):
        try:
            examples.append(_example(metadata, row, fallback, caption_column))
        except DataError as error:
            refused.append(Refused(place, str(error)))
    return examples


def _json_rows(metadata: Path, refused: list[Refused]) -> Iterator[Row]:
    # Not `splitlines`, which also breaks lines at characters that JSON allows inside text.
    for number, line in enumerate(read_text(metadata).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{metadata} line {number}"
        try:
            yield place, json.loads(line)
        except json.JSONDecodeError as error:
            refused.append(Refused(place, f"is not valid JSON ({error.msg} at column {error.colno})"))
        except (ValueError, RecursionError):
            refused.append(Refused(place, "is not valid JSON (too long a number, or too deep)"))


def _csv_rows(metadata: Path, refused: list[Refused]) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(read_text(metadata)), strict=True)
    try:
        if "file_name" not in (reader.fieldnames or ()):
            raise DataError(
                f"{metadata} has no column file_name; its first line must name the columns: file_name,text."
            )
        for row in reader:
            yield f"{metadata} line {reader.line_num}", {key: value for key, value in row.items() if value}
    except csv.Error as error:
        # A quote that is never closed swallows all that follows.
        refused.append(Refused(f"{metadata} line {reader.line_num}", f"is not valid CSV ({error}), from here on"))


def _example(metadata: Path, row: object, fallback: Callable[[Path], str | None], caption_column: str) -> Example:
    """Read a row; its faults are said as the rest of a sentence that begins with where it stands."""
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise DataError('names no image; each line must look like {"file_name": "a.png", "text": "..."}')
    path = _named_file(metadata, row["file_name"])
    caption = row.get(caption_column) or fallback(path)
    if not isinstance(caption, str) or not caption.strip():
        raise DataError(f'has no caption; put it under "{caption_column}", or give one prompt for all')
    check_caption(caption)
    conditions = {key: _named_file(metadata, name) for key, name in _condition_names(row).items()}
    return Example(path, caption.strip(), conditions)


def _condition_names(row: Mapping[str, object]) -> dict[str | int, str]:
    """Read `"condition": "a.png"`, `"conditions": ["a.png", "b.png"]` or `"conditions": {"canny": "a.png"}`."""
    named = row.get("conditions") or row.get("condition") or {}
    listed = named if isinstance(named, list | dict) else [named]
    files: dict[str | int, object] = dict(listed if isinstance(listed, dict) else enumerate(listed))
    names = {key: name for key, name in files.items() if isinstance(name, str)}
    if len(names) != len(files):
        raise DataError('has conditions that are no file names; write {"condition": "a.png"}')
    return names


def _named_file(metadata: Path, name: str) -> Path:
    path = metadata.parent / name
    if not is_file(path):
        raise DataError(f"names {name}, but there is no such file in {metadata.parent}")
    return path
