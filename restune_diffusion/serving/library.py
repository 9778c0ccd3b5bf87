"""Tuner library: a folder of tuner files that requests name."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.display import printable
from ..utils.errors import RestuneError, TunerFileError, TunerNameError
from .private_copy import private_copy, private_header

if TYPE_CHECKING:
    from ..backbones import BaseInfo
    from ..tuners.tuner import Tuner

_SUFFIX = ".safetensors"
_MAX_NAME = 200
_MAX_FILES = 10_000
_MAX_THUMBNAIL = 2 << 20
_MAX_TEXT = 400
_SHOWN = 5


@dataclass(frozen=True)
class TunerEntry:
    """Tuner file of a library.

    Args:
        name: name of the tuner: the path inside the folder without the suffix, with `/` between folders.
        path: path of the file.
        version: changes whenever the file changes.
        bytes: size of the file.
        modified: modification time in seconds since 1970.
        families: families of the tuner's parts: `skip`, `bypass`, `res`, `control`, `text`, or `lora` for a file of
            another program.
        conditions: names of the condition images that the tuner takes.
        trigger_words: words that prompts need for the tuner to act as trained; placeholder tokens among them.
        base: name of the base that the tuner was trained on, if the file records it.
        title: title of the tuner, if the file has one.
        thumbnail: data URL of a thumbnail, if the file has one.
        problem: reason why the tuner cannot be used; None if nothing is known to be wrong with it.
    """

    name: str
    path: Path
    version: str
    bytes: int
    modified: float
    families: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    trigger_words: tuple[str, ...] = ()
    base: str | None = None
    title: str | None = None
    thumbnail: str | None = None
    problem: str | None = None


class TunerLibrary:
    """Folder of tuner files: own files, and LoRA files of diffusers and kohya's sd-scripts.

    A new or changed file is used without a restart. Nothing outside the folder can be named, apart from the given
    files. Safe to use from any thread.

    Args:
        folder: the folder; its subfolders are included, hidden files and folders are not. None for the given files
            alone.
        files: further tuner files by name, such as those of repositories on the Hub; a file of the folder with the
            same name is not used.
        capacity: largest number of tuners that are kept in memory.
        max_bytes: largest size of the tuners that are kept in memory; None sets no limit.

    Raises:
        TunerFileError: if there is no such folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        *,
        files: Mapping[str, Path] | None = None,
        capacity: int | None = 64,
        max_bytes: int | None = None,
    ) -> None:
        self.folder = None if folder is None else Path(folder).expanduser().resolve()
        self._given = dict(files or {})
        if self.folder is not None and not self.folder.is_dir():
            raise TunerFileError(f"The tuner library {folder} is not a folder; create it, or name another.")
        self._capacity, self._max_bytes = capacity, max_bytes
        self._lock = threading.Lock()
        self._entries: dict[Path, TunerEntry] = {}
        self._problems: dict[Path, tuple[str, str]] = {}
        """Version of a file that could not be read, and the reason."""
        self._base: BaseInfo | None = None
        self._cache: Any = None

    def names(self) -> list[str]:
        """Return the names of all tuners, also of broken ones, in alphabetical order."""
        return sorted(name for name, _ in self._files())

    def list(self) -> list[TunerEntry]:
        """Return the entries of all tuner files, also of broken ones, in alphabetical order."""
        files = sorted(self._files())
        with self._lock:
            present = {path for _, path in files}
            for known in (self._entries, self._problems):
                for path in known.keys() - present:
                    del known[path]
        found = (self._entry(name, path) for name, path in files)
        return [entry for entry in found if entry is not None]

    def entry(self, name: str) -> TunerEntry:
        """Return the entry of a tuner.

        Raises:
            TunerNameError: if the library has no tuner of this name.
        """
        path = self._path(name)
        entry = None if path is None else self._entry(name, path)
        if entry is None:
            names = self.names()
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            known = ", ".join(names[:_SHOWN]) + more if names else "none"
            raise TunerNameError(f"The library has no tuner {printable(repr(name), _MAX_NAME)}; it has: {known}.")
        return entry

    def usable(self, name: str) -> TunerEntry:
        """Return the entry of a tuner that is not known to be broken.

        Raises:
            TunerNameError: if the library has no tuner of this name.
            TunerFileError: if its file cannot be used; the message has the reason.
        """
        entry = self.entry(name)
        if entry.problem is not None:
            raise TunerFileError(f"The tuner {entry.name!r} cannot be used: {entry.problem}")
        return entry

    def bind(self, pipeline: Any) -> None:
        """Set the base for which the tuners are read; the engine calls it.

        Raises:
            RestuneError: if the library serves another base already.
        """
        from ..backbones import describe_base, describe_text, text_encoders
        from ..storage.tuner_cache import TunerCache

        text = describe_text(text_encoders(pipeline))
        base = describe_base(pipeline.unet).model_copy(update={"text": text})
        if self._base is not None and self._base != base:
            raise RestuneError("This library serves another base already; make one library for each base.")
        self._base = base
        self._cache = TunerCache(
            self._capacity, max_bytes=self._max_bytes, dtype=pipeline.unet.dtype, read=self._read_file
        )
        with self._lock:
            self._entries.clear()

    def load(self, name: str) -> tuple[TunerEntry, Tuner]:
        """Return a tuner with its entry; a file is read if it is not in memory or has changed.

        The tuner is shared: attach it, which makes a copy, but do not modify it.

        Raises:
            TunerNameError: if the library has no tuner of this name.
            TunerFileError: if its file cannot be used, or changes while it is read.
        """
        assert self._cache is not None, "the library is bound to a base by its engine"
        for _ in range(5):
            entry = self.usable(name)
            try:
                tuner = self._cache.get(entry.path)
            except RestuneError as error:
                with self._lock:
                    self._problems[entry.path] = entry.version, _of_file(error, entry)
                self.usable(name)
                continue
            if _version(entry.path) == entry.version:
                return entry, tuner
        raise TunerFileError(f"The file of the tuner {name!r} changes while it is read; try again.")

    def _files(self) -> Iterator[tuple[str, Path]]:
        """Yield names and paths of the tuner files; a link that leaves the folder is not one."""
        yield from self._given.items()
        if self.folder is None:
            return
        count = 0
        for folder, folders, files in os.walk(self.folder):
            folders[:] = sorted(each for each in folders if not each.startswith("."))
            for file in sorted(files):
                path = Path(folder, file)
                if file.startswith(".") or not file.endswith(_SUFFIX) or not self._is_inside(path):
                    continue
                count += 1
                if count > _MAX_FILES:
                    return
                name = path.relative_to(self.folder).as_posix().removesuffix(_SUFFIX)
                if name not in self._given:
                    yield name, path

    def _path(self, name: object) -> Path | None:
        """Return the path of a name, or None if it names nothing inside the folder."""
        if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME or not name.isprintable() or "\\" in name:
            return None
        if name in self._given:
            return self._given[name]
        # An empty step is that of an absolute path; a step with a dot in front is hidden, or leads upwards.
        if any(not step or step.startswith(".") for step in name.split("/")):
            return None
        path = None if self.folder is None else self.folder / f"{name}{_SUFFIX}"
        return path if path is not None and self._is_inside(path) else None

    def _is_inside(self, path: Path) -> bool:
        assert self.folder is not None
        try:
            return path.is_file() and path.resolve().is_relative_to(self.folder)
        except (OSError, ValueError, RuntimeError):
            return False

    def _entry(self, name: str, path: Path) -> TunerEntry | None:
        version = _version(path)
        if version is None:
            return None
        with self._lock:
            entry = self._entries.get(path)
            problem = self._problems.get(path)
        if entry is None or entry.version != version:
            entry = self._described(name, path, version)
            with self._lock:
                self._entries[path] = entry
        return replace(entry, problem=problem[1]) if problem is not None and problem[0] == version else entry

    def _described(self, name: str, path: Path, version: str) -> TunerEntry:
        """Read the header of a file; a file that cannot be used is described with the reason."""
        modified, size = (int(part) for part in version.split("-")[:2])
        entry = TunerEntry(name, path, version, size, modified / 1e9)
        try:
            with private_header(path) as header:
                return self._read_entry(entry, header)
        except RestuneError as error:
            return replace(entry, problem=_of_file(error, entry))

    def _read_entry(self, entry: TunerEntry, header: Path) -> TunerEntry:
        from ..conversion.formats import recognized_family
        from ..storage.header import VERSION_KEY, open_tensors, read_header

        with open_tensors(header, "numpy") as file:
            metadata: dict[str, str] = file.metadata() or {}
            keys = file.keys()
        if VERSION_KEY not in metadata:
            family = recognized_family(keys)
            if family is None:
                raise TunerFileError("It is neither a tuner nor a LoRA of a known layout.")
            entry = replace(entry, families=(family,), trigger_words=_words(metadata))
            return _with_metadata(entry, metadata, metadata.get("ss_sd_model_name"))
        info = read_header(header)
        if self._base is not None:
            info.base.check_fits(self._base)
            info.base.check_text_fits(self._base.text)
        entry = replace(
            entry,
            families=tuple(config.part for config in info.configs),
            conditions=tuple(name for config in info.configs for name in getattr(config, "conditions", ())),
            trigger_words=tuple(printable(word, _MAX_TEXT) for word in info.trigger_words),
        )
        return _with_metadata(entry, metadata, info.base.name)

    def _read_file(self, path: Path) -> Tuner:
        """Read a tuner file, or convert a file of another program; called by the cache."""
        from ..conversion.formats import import_tuner
        from ..storage.header import VERSION_KEY, open_tensors
        from ..storage.tuner_file import load_tuner

        assert self._base is not None
        with private_copy(path) as copy:
            with open_tensors(copy, "numpy") as file:
                is_ours = VERSION_KEY in (file.metadata() or {})
            return load_tuner(copy, dtype=self._cache.dtype) if is_ours else import_tuner(copy, self._base)


def _version(path: Path) -> str | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return f"{status.st_mtime_ns}-{status.st_size}-{status.st_ino}"


def _of_file(error: RestuneError, entry: TunerEntry) -> str:
    """Return the reason of an error without the path of the server's file."""
    return printable(str(error).replace(str(entry.path), "The file"), _MAX_TEXT)


def _words(metadata: dict[str, str]) -> tuple[str, ...]:
    phrase = metadata.get("modelspec.trigger_phrase", "")
    return tuple(printable(word, _MAX_TEXT) for part in phrase.split(",") if (word := part.strip()))


def _with_metadata(entry: TunerEntry, metadata: dict[str, str], base: str | None) -> TunerEntry:
    title, thumbnail = metadata.get("modelspec.title"), metadata.get("modelspec.thumbnail", "")
    is_image = thumbnail.startswith("data:image/") and len(thumbnail) <= _MAX_THUMBNAIL
    return replace(
        entry,
        base=printable(base, _MAX_TEXT) if base else None,
        title=printable(title, _MAX_TEXT) if title else None,
        thumbnail=thumbnail if is_image and thumbnail.isprintable() else None,
    )
