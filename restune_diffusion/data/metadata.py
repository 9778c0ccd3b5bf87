"""Read the metadata file of an image folder: `metadata.jsonl`, or `metadata.csv` with the same columns."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ..utils.display import counted
from ..utils.errors import DataError
from .example import Example, caption_list, check_caption
from .files import is_file, read_text
from .refusals import Refused

METADATA_FILE = "metadata.jsonl"
METADATA_CSV = "metadata.csv"

# Folder of the training split in the layout of `datasets` (imagefolder).
_SPLIT = "train"

# Columns that have a meaning of their own.
_NOT_TEXT = {"file_name", "condition", "conditions"}

Row = tuple[str, object]
"""Position of a row in its file, and its value."""


def find_metadata(folder: Path, files: Sequence[Path]) -> Path | None:
    """Return the metadata file of a folder, or else that of its subfolder `train`; JSON lines come first.

    Args:
        folder: the data folder.
        files: its files.
    """
    for place in (folder, folder / _SPLIT):
        for name in (METADATA_FILE, METADATA_CSV):
            found = [path for path in files if path.parent == place and path.name.lower() == name]
            if found:
                return min(found, key=lambda path: path.name != name)
    return None


def read_metadata(
    metadata: Path,
    fallback: Callable[[Path], str | None],
    refused: list[Refused],
    caption_column: str = "text",
) -> list[Example]:
    """Return the examples of a metadata file; invalid rows, such as a truncated last line, are refused.

    Args:
        metadata: path of the file.
        fallback: function that returns the caption of an image without a caption in its row.
        refused: list that receives the skipped rows.
        caption_column: column or key of the captions.

    Raises:
        DataError: if the file cannot be read.
    """
    examples = []
    unread: dict[str, int] = {}
    rows = _csv_rows if metadata.suffix.lower() == ".csv" else _json_rows
    for place, row in rows(metadata, refused):
        try:
            examples.append(_example(metadata, row, fallback, caption_column))
        except DataError as error:
            refused.append(Refused(place, str(error)))
            continue
        for column in _other_texts(row, caption_column):
            unread[column] = unread.get(column, 0) + 1
    for column, count in unread.items():
        reason = (
            f"has {counted(count, 'row')} without a caption in `{caption_column}`, but with text in `{column}`, which "
            f"is not read; set --caption-column {column} to train on it"
        )
        refused.append(Refused(str(metadata), reason, fault=False))
    return examples


def _other_texts(row: object, caption_column: str) -> list[str]:
    """Return the columns of text in a row whose caption column is empty."""
    if not isinstance(row, dict) or row.get(caption_column):
        return []
    return [name for name, value in row.items() if name not in _NOT_TEXT and isinstance(value, str) and value.strip()]


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
            refused.append(Refused(place, "is not valid JSON (number too long, or nesting too deep)"))


def _csv_rows(metadata: Path, refused: list[Refused]) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(read_text(metadata)), strict=True)
    try:
        columns = list(reader.fieldnames or ())
        if "file_name" not in columns:
            raise DataError(
                f"{metadata} has no column file_name; its first line must name the columns: file_name,text."
            )
        twice = [name for name in columns if columns.count(name) > 1]
        if twice:
            raise DataError(f"{metadata} has two columns {twice[0]!r}; rename one of them in the first line.")
        for row in reader:
            place = f"{metadata} line {reader.line_num}"
            if None in row:
                # `DictReader` collects the fields without a column under None.
                fields = len(columns) + len(row[None])
                refused.append(
                    Refused(
                        place,
                        f"has {fields} fields for {len(columns)} columns; "
                        f'put a caption that contains commas in double quotes: a.png,"red, round"',
                    )
                )
                continue
            yield place, {key: value for key, value in row.items() if value}
    except csv.Error as error:
        # An unclosed quote invalidates the rest of the file.
        refused.append(Refused(f"{metadata} line {reader.line_num}", f"is not valid CSV ({error}), from here on"))


def _example(metadata: Path, row: object, fallback: Callable[[Path], str | None], caption_column: str) -> Example:
    """Return the example of a row; a `DataError` message continues a sentence that starts with the row's position."""
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise DataError('names no image; each line must look like {"file_name": "a.png", "text": "..."}')
    path = _named_file(metadata, row["file_name"])
    captions = caption_list(row.get(caption_column))
    caption = captions[0] if captions else row.get(caption_column) or fallback(path)
    if not isinstance(caption, str) or not caption.strip():
        raise DataError(
            f'has no caption; add "{caption_column}" to the row, set --caption-column to another of its columns, '
            f"or set one prompt for all images"
        )
    check_caption(caption)
    conditions = {key: _named_file(metadata, name) for key, name in _condition_names(row).items()}
    return Example(path, caption.strip(), conditions, captions=captions)


def _condition_names(row: Mapping[str, object]) -> dict[str | int, str]:
    """Parse `"condition": "a.png"`, `"conditions": ["a.png", "b.png"]` or `"conditions": {"canny": "a.png"}`."""
    named = row.get("conditions") or row.get("condition") or {}
    listed = named if isinstance(named, list | dict) else [named]
    files: dict[str | int, object] = dict(listed if isinstance(listed, dict) else enumerate(listed))
    names = {key: name for key, name in files.items() if isinstance(name, str)}
    if len(names) != len(files):
        raise DataError('has conditions that are not file names; write {"condition": "a.png"}')
    return names


def _named_file(metadata: Path, name: str) -> Path:
    # Files written on Windows separate folders by a backslash.
    choices = (metadata.parent / name, metadata.parent / name.replace("\\", "/"))
    path = next((choice for choice in choices if is_file(choice)), None)
    if path is None:
        raise DataError(f"names {name}, but there is no such file in {metadata.parent}")
    return path
