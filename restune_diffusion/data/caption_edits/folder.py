"""Edit the caption files or the metadata file of a folder: all of them, or none."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...utils.atomic_write import atomic_write
from ...utils.errors import DataError
from ..conventions.caption_files import CaptionFiles
from ..example import check_caption
from ..refusals import Refused
from .editable import editable_folder

_BREAK = re.compile(r"(\r\n|\n|\r)")


@dataclass(frozen=True)
class Change:
    """Change of one caption.

    Attributes:
        place: file, or file and line.
        before: caption before the edit.
        after: caption after it.
    """

    place: str
    before: str
    after: str


@dataclass
class EditPlan:
    """Edit of a folder that is not written yet.

    Attributes:
        folder: the data folder.
        captions: number of captions that were read.
        changes: captions that change.
        contents: bytes before and after, of each file that changes; None before for a new file.
        refused: files and rows that are left as they are, with the reason.
    """

    folder: Path
    captions: int = 0
    changes: list[Change] = field(default_factory=list)
    contents: dict[Path, tuple[bytes | None, bytes]] = field(default_factory=dict)
    refused: list[Refused] = field(default_factory=list)

    def write(self, backup: Path | None = None) -> None:
        """Write the changed files; if one cannot be written, those before it are restored.

        Args:
            backup: ZIP archive to write the files to as they were.

        Raises:
            RestuneError: if a file cannot be written.
        """
        if backup is not None:
            self._write_backup(backup)
        written: list[Path] = []
        try:
            for path, (_, after) in self.contents.items():
                written.append(path)
                _write(path, after)
        except BaseException:
            for path in written:
                before = self.contents[path][0]
                if before is None:
                    if path.is_file():
                        path.unlink()
                elif path.read_bytes() != before:
                    _write(path, before)
            raise

    def _write_backup(self, backup: Path) -> None:
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, (before, _) in self.contents.items():
                if before is not None:
                    archive.writestr(path.relative_to(self.folder).as_posix(), before)
        _write(backup, content.getvalue())


def plan_edit(folder: Path, edit: Callable[[str], str], caption_column: str = "text") -> EditPlan:
    """Return what an edit changes in the captions of a folder.

    Args:
        folder: folder with a metadata file, or with caption files beside its images.
        edit: function from a caption to the edited one. Each line of a caption file is one caption.
        caption_column: key of the captions in `metadata.jsonl`.

    Raises:
        DataError: if the folder has no captions that can be edited, or an edited caption is empty.
    """
    found = editable_folder(folder)
    plan = EditPlan(folder, refused=found.refused)
    if (metadata := found.metadata) is not None:
        _plan_file(plan, metadata, lambda text: _edited_rows(plan, metadata, text, edit, caption_column))
    else:
        sidecars = CaptionFiles(found.files)
        for sidecar in dict.fromkeys(path for image in found.images if (path := sidecars.of(image)) is not None):
            _plan_file(plan, sidecar, lambda text, at=sidecar: _edited_lines(plan, at, text, edit))  # type: ignore[misc]
    if not plan.captions:
        first = f" ({plan.refused[0]})" if plan.refused else ""
        raise DataError(f"{folder} has no captions to edit{first}; caption it first with `restune data caption`.")
    return plan


def diff(changes: Sequence[Change]) -> Iterator[str]:
    """Yield the lines of a comparison of captions: place, before and after."""
    for change in changes:
        yield change.place
        yield f"- {change.before}"
        yield f"+ {change.after}"


def _plan_file(plan: EditPlan, path: Path, edited: Callable[[str], str]) -> None:
    try:
        before = path.read_bytes()
        text = before.decode("utf-8")
    except OSError as error:
        plan.refused.append(Refused(str(path), f"cannot be read ({error.strerror})"))
        return
    except UnicodeDecodeError:
        plan.refused.append(Refused(str(path), "is not UTF-8 text; save it as UTF-8"))
        return
    # Notepad writes a byte order mark, which stays.
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    after = (mark + edited(text.removeprefix(mark))).encode()
    if after != before:
        plan.contents[path] = (before, after)


def _edited_lines(plan: EditPlan, path: Path, text: str, edit: Callable[[str], str]) -> str:
    pieces = _BREAK.split(text)
    # Every second piece is a line break.
    filled = [number for number in range(0, len(pieces), 2) if pieces[number].strip()]
    for number in filled:
        line = f" line {number // 2 + 1}" if len(filled) > 1 else ""
        pieces[number] = _edited(plan, f"{path}{line}", pieces[number], edit)
    return "".join(pieces)


def _edited_rows(plan: EditPlan, path: Path, text: str, edit: Callable[[str], str], column: str) -> str:
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        place = f"{path} line {number + 1}"
        try:
            row = json.loads(line)
            value = row.get(column)
        except (ValueError, AttributeError, RecursionError):
            plan.refused.append(Refused(place, "is not a row of JSON and is left as it is"))
            continue
        captions = value if isinstance(value, list) else [value]
        if not all(isinstance(caption, str) for caption in captions):
            plan.refused.append(Refused(place, f"has no caption in `{column}` and is left as it is"))
            continue
        edited = [_edited(plan, place, caption, edit) if caption.strip() else caption for caption in captions]
        if edited != captions:
            row[column] = edited if isinstance(value, list) else edited[0]
            end = "\r" if line.endswith("\r") else ""
            lines[number] = json.dumps(row, ensure_ascii="\\u" in line) + end
    return "\n".join(lines)


def _edited(plan: EditPlan, place: str, caption: str, edit: Callable[[str], str]) -> str:
    place = place.removeprefix(f"{plan.folder}/")
    plan.captions += 1
    # Spaces around a caption are not part of it.
    inner = caption.strip()
    after = edit(inner)
    if after == inner:
        return caption
    after = after.strip()
    if not after:
        raise DataError(f"{place} would have an empty caption; nothing is written. Choose another edit.")
    if _BREAK.search(after):
        raise DataError(f"{place} would get a line break inside a caption; nothing is written. Choose another edit.")
    try:
        check_caption(after)
    except DataError as error:
        raise DataError(f"{place} {error}") from error
    plan.changes.append(Change(place, inner, after))
    return after


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)
