"""Changes of the library's folder: rename, delete, restore, import, export, and files of runs."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from ...serving.library import TunerEntry, TunerLibrary
from ...utils.display import printable
from ...utils.errors import RestuneError, TunerFileError, TunerNameError, UsageError
from ..workspace import Workspace
from .thumbnails import newest_sample, with_metadata

_SUFFIX = ".safetensors"
_PICKLES = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle"})
_MOST_NAME = 120


@dataclass(frozen=True)
class TrashEntry:
    """Deleted tuner file: the id of its place in the trash, and the name it had."""

    id: str
    name: str
    deleted: datetime

    @property
    def label(self) -> str:
        """Name and time, for a list."""
        return f"{self.name} (deleted {self.deleted:%Y-%m-%d %H:%M} UTC)"


class Shelf:
    """Library of tuner files that a person changes from the page.

    Args:
        workspace: folders of the studio.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self.library = TunerLibrary(workspace.tuners)

    def entries(self, query: str = "") -> list[TunerEntry]:
        """Return the tuners that contain every word of a search, in their names, titles, trigger words or bases."""
        words = query.lower().split()
        return [entry for entry in self.library.list() if all(word in _searched(entry) for word in words)]

    def rename(self, name: str, new_name: str) -> str:
        """Give a tuner another name and return it.

        Raises:
            TunerNameError: if there is no such tuner, or the new name is taken or not allowed.
        """
        new_name = new_name.strip()
        source = self.library.entry(name).path
        if new_name != name:
            _move_new(source, self._place(new_name), new_name)
        return new_name

    def delete(self, name: str) -> TrashEntry:
        """Move a tuner to the trash.

        Raises:
            TunerNameError: if there is no such tuner.
        """
        entry = self.library.entry(name)
        place = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        _move_new(entry.path, self._workspace.trash / place / f"{name}{_SUFFIX}", name)
        return next(each for each in self.trash() if each.id.startswith(place))

    def trash(self) -> list[TrashEntry]:
        """Return the deleted tuners, the last one first."""
        found = []
        for path in self._workspace.trash.rglob(f"*{_SUFFIX}"):
            parts = path.relative_to(self._workspace.trash).as_posix().removesuffix(_SUFFIX).partition("/")
            with contextlib.suppress(ValueError):
                deleted = datetime.strptime(parts[0][:15], "%Y%m%d-%H%M%S").replace(tzinfo=UTC)
                found.append(TrashEntry(f"{parts[0]}/{parts[2]}", parts[2], deleted))
        return sorted(found, key=lambda each: (each.deleted, each.id), reverse=True)

    def restore(self, trash_id: str) -> str:
        """Move a deleted tuner back and return its name; a number is added if the name is taken.

        Raises:
            TunerNameError: if it is not in the trash.
        """
        entry = self._in_trash(trash_id)
        name = self._free_name(entry.name)
        path = self._workspace.trash / f"{entry.id}{_SUFFIX}"
        _move_new(path, self._place(name), name)
        self._remove_empty(path.parent)
        return name

    def remove_for_good(self, trash_id: str) -> str:
        """Delete a tuner of the trash, and return its name.

        Raises:
            TunerNameError: if it is not in the trash.
        """
        entry = self._in_trash(trash_id)
        path = self._workspace.trash / f"{entry.id}{_SUFFIX}"
        path.unlink(missing_ok=True)
        self._remove_empty(path.parent)
        return entry.name

    def import_file(self, file: Path, base: str) -> str:
        """Copy an uploaded tuner into the library, converted to this program's format, and return its name.

        Args:
            file: file of this program, or a LoRA file of diffusers or kohya's sd-scripts.
            base: base that a file of another program is for.

        Raises:
            RestuneError: if the file is of another kind, damaged, or does not fit the base.
        """
        from ...conversion.convert import is_tuner_file, load_any
        from ...storage.base_files.contents import kind_of
        from ...storage.base_files.tensor_header import read_tensor_header
        from ...storage.header import open_tensors, read_info
        from ...storage.tuner_file import save_tuner

        shown = printable(file.name, _MOST_NAME)
        if file.suffix.lower() in _PICKLES:
            raise TunerFileError(
                f"{shown} is a pickle file, which can run code when it is opened; get the tuner as .safetensors."
            )
        if file.suffix.lower() != _SUFFIX:
            raise TunerFileError(f"{shown} is not a tuner; choose a file that ends in .safetensors.")
        try:
            with open_tensors(file, "numpy"):
                pass
            if is_tuner_file(file):
                read_info(file)
                name = self._free_name(_usable_name(file.stem))
                _copy_new(file, self._place(name), name)
                return name
            kind = kind_of(read_tensor_header(file))
            if kind not in ("a LoRA", "a LyCORIS file", "not a model known here"):
                raise TunerFileError(
                    f"{shown} is {kind}; the library takes tuners and LoRA files. A base is given with "
                    "`restune studio --base`."
                )
            tuner = load_any(file, base=base)
            name = self._free_name(_usable_name(file.stem))
            save_tuner(tuner, self._place(name), metadata={"modelspec.title": name})
            return name
        except RestuneError as error:
            raise TunerFileError(str(error).replace(str(file), shown)) from error

    def export(self, name: str, layout: Literal["restune", "diffusers", "kohya"], folder: Path) -> Path:
        """Write a tuner to a folder in a layout, for a download, and return the file.

        Raises:
            RestuneError: if there is no such tuner, or the layout cannot hold it.
        """
        from ...conversion.formats import export_tuner
        from ...storage.tuner_file import load_tuner

        path = self.library.usable(name).path
        target = folder / f"{name.rpartition('/')[2]}{'' if layout == 'restune' else f'-{layout}'}{_SUFFIX}"
        if layout == "restune":
            shutil.copyfile(path, target)
        else:
            try:
                export_tuner(load_tuner(path), target, layout)
            except RestuneError as error:
                raise TunerFileError(_without_folder(error, path, target)) from error
        return target

    def run_files(self) -> Mapping[str, Path]:
        """Return the tuner files in the output folders of runs, by `run/file`, the newest first."""
        found = {}
        for path in self._workspace.runs.glob(f"*/*{_SUFFIX}"):
            with contextlib.suppress(OSError):
                if not path.name.startswith(".") and path.resolve().is_relative_to(self._workspace.runs.resolve()):
                    found[f"{path.parent.name}/{path.stem}"] = (path.stat().st_mtime, path)
        return {name: found[name][1] for name in sorted(found, key=lambda each: found[each][0], reverse=True)}

    def add_from_run(self, name: str) -> str:
        """Copy a run's tuner into the library, with its newest sample as thumbnail, and return its name.

        Raises:
            RestuneError: if no run has such a file, or it is damaged.
        """
        path = self.run_files().get(name)
        if path is None:
            raise TunerNameError(f"No run has the tuner {printable(repr(name), _MOST_NAME)}; reload the list.")
        wanted = _usable_name(path.stem)
        # Most runs call their file the same.
        taken = wanted in self.library.names() or wanted in ("tuner", "restune")
        new_name = self._free_name(_usable_name(path.parent.name) if taken else wanted)
        with_metadata(path, self._place(new_name), thumbnail=newest_sample(path.parent), title=new_name)
        return new_name

    def _place(self, name: str) -> Path:
        """Return the path of a new tuner.

        Raises:
            TunerNameError: if the name is not allowed.
        """
        steps = name.split("/")
        plain = 0 < len(name) <= _MOST_NAME and name.isprintable() and not any(each in name for each in '\\:*?"<>|')
        if not plain or any(not step.strip(". ") or step[0] in ". " or step[-1] in ". " for step in steps):
            raise TunerNameError(
                f"{printable(repr(name), _MOST_NAME)} cannot be the name of a tuner; use up to {_MOST_NAME} letters, "
                "digits, spaces, `-` and `_`, and `/` for a folder."
            )
        return self._workspace.inside(f"{name}{_SUFFIX}", self._workspace.tuners)

    def _free_name(self, name: str) -> str:
        number, free = 2, name
        while os.path.lexists(self._place(free)):
            number, free = number + 1, f"{name}-{number}"
        return free

    def _in_trash(self, trash_id: str) -> TrashEntry:
        entry = next((each for each in self.trash() if each.id == trash_id), None)
        if entry is None:
            raise TunerNameError("This tuner is not in the trash; reload the list.")
        return entry

    def _remove_empty(self, folder: Path) -> None:
        with contextlib.suppress(OSError):
            while folder != self._workspace.trash:
                folder.rmdir()
                folder = folder.parent


def _searched(entry: TunerEntry) -> str:
    return " ".join([entry.name, entry.title or "", entry.base or "", *entry.trigger_words, *entry.families]).lower()


def _usable_name(stem: str) -> str:
    """Return a name without the characters that names of tuners cannot have."""
    kept = "".join(each if each.isalnum() or each in "-_. " else "_" for each in stem)[: _MOST_NAME - 10]
    return kept.strip(". ") or "tuner"


def _move_new(source: Path, target: Path, name: str) -> None:
    """Move a file to a path where there must be none."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(target):
            raise _taken(name)
        source.rename(target)
    except OSError as error:
        raise UsageError(f"The file of {name!r} cannot be moved: {error.strerror}.") from error


def _copy_new(source: Path, target: Path, name: str) -> None:
    from ...utils.atomic_write import atomic_write

    if os.path.lexists(target):
        raise _taken(name)
    with source.open("rb") as read, atomic_write(target) as write:
        shutil.copyfileobj(read, write, 1 << 20)


def _taken(name: str) -> TunerNameError:
    return TunerNameError(f"The library has a tuner {printable(repr(name), _MOST_NAME)} already; choose another name.")


def _without_folder(error: RestuneError, *paths: Path) -> str:
    text = str(error)
    for path in paths:
        text = text.replace(str(path), path.name)
    return text
