"""Unpack an uploaded ZIP archive, which nobody has checked."""

from __future__ import annotations

import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import IO

from ....data.refusals import Refused
from ....utils.display import printable, readable_size
from ....utils.errors import DataError

_END_RECORD = b"PK\x05\x06"
_END_BYTES = 22
_LONGEST_COMMENT = 65_535
_CHUNK = 1 << 20
# Damaged entries give the errors of their decoders, IndexError for an empty name, struct.error for a cut header, and
# RuntimeError for an unknown method.
_DAMAGED = (
    zipfile.BadZipFile, EOFError, OSError, ValueError, IndexError, RuntimeError, struct.error, zlib.error, LZMAError
)  # fmt: skip


@dataclass(frozen=True)
class ArchiveLimits:
    """Limits of an archive.

    Attributes:
        files: number of entries, folders included.
        file_bytes: unpacked size of one file.
        total_bytes: unpacked size of all files.
        depth: number of folders above a file.
    """

    files: int = 20_000
    file_bytes: int = 256 * 2**20
    total_bytes: int = 4 * 2**30
    depth: int = 8


def unpack_archive(
    archive: Path, folder: Path, unusable: Callable[[str], str | None], limits: ArchiveLimits | None = None
) -> list[Refused]:
    """Write the usable files of a ZIP archive to a folder, below the same subfolders.

    A folder that contains all files is left out, and so are hidden files and those that macOS adds.

    Args:
        archive: path of the archive.
        folder: an empty folder.
        unusable: function from a file's name to the reason why it is not unpacked, or None.
        limits: limits of the archive.

    Returns:
        Files that were left out, with the reason.

    Raises:
        DataError: if the archive is damaged, encrypted, too large, or leads out of the folder; the folder may then
            hold some of its files.
    """
    limits = limits or ArchiveLimits()
    name = printable(archive.name, 60)
    refused: list[Refused] = []
    try:
        _check_end(archive, name, limits)
        with zipfile.ZipFile(archive) as opened:
            entries = [entry for entry in opened.infolist() if not entry.is_dir()]
            _check_entries(opened.infolist(), name, limits)
            kept = [entry for entry in entries if not _is_hidden(entry.filename)]
            top = _common_folder([entry.filename for entry in kept])
            left = limits.total_bytes
            for entry in kept:
                inside = entry.filename[len(top) :]
                reason = _no_file(entry) or unusable(inside)
                if reason is not None:
                    refused.append(Refused(inside, reason, fault=False))
                    continue
                target = folder / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(entry) as source:
                    left -= _copy(source, target, min(left, limits.file_bytes), name)
    except _DAMAGED as error:
        raise DataError(f"{name} cannot be unpacked ({_reason(error)}); make the zip file again.") from error
    return refused


def _check_end(archive: Path, name: str, limits: ArchiveLimits) -> None:
    """Refuse a list of files that would fill the memory, before the list is read."""
    size = archive.stat().st_size
    with archive.open("rb") as file:
        file.seek(max(0, size - _END_BYTES - _LONGEST_COMMENT))
        tail = file.read()
    place = tail.rfind(_END_RECORD)
    if place < 0 or len(tail) - place < _END_BYTES:
        raise DataError(f"{name} is not a zip file, or only a part of one; make the zip file again.")
    listed = int.from_bytes(tail[place + 12 : place + 16], "little")
    # A list entry has 46 bytes and a name; zipfile reads as many entries as there are bytes, whatever their number is.
    if listed > limits.files * (46 + 512):
        raise DataError(f"{name} lists more than {limits.files:,} files; divide it into several zip files.")


def _check_entries(entries: list[zipfile.ZipInfo], name: str, limits: ArchiveLimits) -> None:
    if len(entries) > limits.files:
        raise DataError(f"{name} has {len(entries):,} files, and the limit is {limits.files:,}; divide it.")
    declared = sum(entry.file_size for entry in entries)
    if declared > limits.total_bytes:
        raise DataError(
            f"{name} would unpack to {readable_size(declared)}, and the limit is {readable_size(limits.total_bytes)}; "
            "divide it into several zip files."
        )
    for entry in entries:
        path = PurePosixPath(entry.filename.replace("\\", "/"))
        shown = printable(entry.filename, 60)
        if path.is_absolute() or ".." in path.parts or ":" in path.as_posix():
            raise DataError(
                f"{name} has a file named {shown}, which leads out of its folder; nothing was unpacked. Make the zip "
                "file again from the folder of images."
            )
        if len(path.parts) > limits.depth + 1:
            raise DataError(f"{name} has a file in more than {limits.depth} nested folders, {shown}; pack fewer.")
        if entry.flag_bits & 1:
            raise DataError(f"{name} is encrypted; make a zip file without a password.")


def _no_file(entry: zipfile.ZipInfo) -> str | None:
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind and not stat.S_ISREG(kind):
        return "is a link, which is not followed" if stat.S_ISLNK(kind) else "is not a regular file"
    return None


def _is_hidden(filename: str) -> bool:
    parts = PurePosixPath(filename.replace("\\", "/")).parts
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _common_folder(names: list[str]) -> str:
    """Return the folder at the front of all names, with its `/`, or an empty text."""
    if not names or any("/" not in name for name in names):
        return ""
    shared = ""
    for parts in zip(*(name.split("/")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared += f"{parts[0]}/"
    return shared


def _copy(source: IO[bytes], target: Path, most: int, name: str) -> int:
    """Write a file and return its size; the size that the archive declares is not trusted."""
    written = 0
    with target.open("xb") as file:
        while chunk := source.read(_CHUNK):
            written += len(chunk)
            if written > most:
                raise DataError(
                    f"{name} unpacks to more than the limit of {readable_size(most)}; divide it into several files."
                )
            file.write(chunk)
    return written


def _reason(error: BaseException) -> str:
    if isinstance(error, FileExistsError):
        return "two of its files have the same name"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()  # without the path, which is not that of the person's file
    if isinstance(error, IndexError):
        return "a file in it has no name"
    return printable(" ".join(str(error).split()) or type(error).__name__, 100)


def remove_tree(folder: Path) -> None:
    """Remove a folder and its content, if it exists."""
    shutil.rmtree(folder, ignore_errors=True)
