"""Store uploaded images and archives as a data folder: the whole of an upload, or nothing."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from ....data.conventions.caption_files import is_caption_file
from ....data.conventions.image_suffixes import missing_reader
from ....data.files import is_image, list_files
from ....data.metadata import METADATA_CSV, METADATA_FILE
from ....data.refusals import Refused
from ....utils.display import counted, printable
from ....utils.errors import DataError, UsageError
from .archives import ArchiveLimits, remove_tree, unpack_archive

_INCOMING = ".incoming-"
_OLD_SECONDS = 3600
_NAME = re.compile(r"[\w][\w.\- ]{0,63}")
MOST_PIXELS = 80_000_000
"""Number of pixels of an uploaded image, below Pillow's own limit; decoding takes several bytes for each."""


@dataclass(frozen=True)
class Upload:
    """Stored upload: its folder, the number of images, and the files that were left out."""

    folder: Path
    images: int
    refused: tuple[Refused, ...]


def store_upload(files: Sequence[Path], root: Path, name: str = "", limits: ArchiveLimits | None = None) -> Upload:
    """Store uploaded files as a new folder in `root`.

    Args:
        files: images, caption files, metadata files and ZIP archives of them.
        root: folder of all uploads.
        name: name of the new folder; by default that of the archive. A number is added if the name is taken.
        limits: limits of each archive.

    Raises:
        DataError: if there is no image, or an archive is refused; nothing is stored then.
        UsageError: if the name is not valid.
    """
    archives = [path for path in files if path.suffix.lower() == ".zip"]
    name = name.strip() or _usable_name(archives[0].stem if archives else "images")
    if not _NAME.fullmatch(name) or name.endswith("."):
        raise UsageError(
            f"{printable(name, 60)!r} cannot be the name of a folder; use up to 64 letters, digits, `.`, `_`, `-` and "
            "spaces, with a letter or digit first."
        )
    incoming = Path(tempfile.mkdtemp(prefix=_INCOMING, dir=root))
    try:
        refused: list[Refused] = []
        for path in files:
            if path in archives:
                # Several archives may have the same names inside.
                place = incoming if len(files) == 1 else _free(incoming / _usable_name(path.stem))
                place.mkdir(exist_ok=True)
                refused += unpack_archive(path, place, _unusable, limits)
            elif (reason := _unusable(path.name)) is not None:
                refused.append(Refused(path.name, reason, fault=False))
            else:
                shutil.copyfile(path, _free(incoming / path.name))
        found = list_files(incoming, [])
        _check_metadata(incoming, found)
        refused += _removed_images(incoming, found)
        images = sum(is_image(path) for path in list_files(incoming, []))
        if not images:
            first = f": {refused[0]}" if refused else "."
            raise DataError(f"There is no image to use in the upload{first} Drop PNG, JPEG or WebP files, or a zip.")
        return Upload(_publish(incoming, root / name), images, tuple(refused))
    finally:
        remove_tree(incoming)


def remove_leftovers(root: Path) -> None:
    """Remove what uploads left behind that were cut off by the end of their process, an hour ago or earlier."""
    for path in root.glob(f"{_INCOMING}*"):
        if time.time() - path.stat().st_mtime > _OLD_SECONDS:
            remove_tree(path)


def describe_upload(upload: Upload, most: int = 8) -> str:
    """Return a summary of an upload: the number of images, and the files that were left out with the reason."""
    lines = [f"{counted(upload.images, 'image')} stored in {upload.folder.name}."]
    lines += [str(each) for each in upload.refused[:most]]
    if len(upload.refused) > most:
        lines.append(f"And {len(upload.refused) - most} more files were left out.")
    return "\n".join(lines)


def _unusable(name: str) -> str | None:
    path = Path(name)
    if is_image(path) or is_caption_file(path) or path.name.lower() in (METADATA_FILE, METADATA_CSV):
        return None
    extension = f" (unknown extension `{path.suffix}`)" if path.suffix else ""
    return missing_reader(path.suffix) or f"is not an image file{extension}"


def _removed_images(folder: Path, files: Sequence[Path]) -> Iterator[Refused]:
    """Remove the images that are too large to be read, by the size in their header alone."""
    for path in files:
        pixels = _declared_pixels(path) if is_image(path) else 0
        if pixels > MOST_PIXELS:
            path.unlink()
            yield Refused(
                path.relative_to(folder).as_posix(),
                f"has {pixels / 10**6:.0f} megapixels, and the limit is {MOST_PIXELS // 10**6}; save a smaller copy",
            )


def _declared_pixels(path: Path) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as image:
                return image.width * image.height
        except Image.DecompressionBombError as error:
            found = re.search(r"(\d+) pixels", str(error))
            return int(found[1]) if found else MOST_PIXELS + 1
        except Exception:  # a damaged file; the data sheet names it with the reason
            return 0


def _check_metadata(folder: Path, files: Sequence[Path]) -> None:
    """Refuse metadata that names files outside the upload: training would read them."""
    for path in files:
        if path.name.lower() not in (METADATA_FILE, METADATA_CSV):
            continue
        for value in _named_files(path, folder):
            parts = PurePosixPath(value.replace("\\", "/"))
            drive = bool(re.match(r"[A-Za-z]:", value))
            if parts.is_absolute() or ".." in parts.parts or drive:
                raise DataError(
                    f"{path.relative_to(folder).as_posix()} names {printable(value, 60)}, which is outside the "
                    "upload; name only files beside it."
                )


def _named_files(path: Path, folder: Path) -> Iterator[str]:
    text = path.read_text("utf-8-sig", errors="replace")
    if path.name.lower() == METADATA_CSV:
        try:
            rows: list[Any] = list(csv.DictReader(io.StringIO(text)))
        except csv.Error as error:
            raise DataError(
                f"{path.relative_to(folder).as_posix()} cannot be read ({error}); save the table again as CSV."
            ) from error
    else:
        rows = [_parsed(line) for line in text.split("\n") if line.strip()]
    for row in rows:
        if isinstance(row, dict):
            for key in ("file_name", "condition", "conditions"):
                yield from _texts(row.get(key))


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def _usable_name(text: str) -> str:
    return re.sub(r"[^\w.\- ]", "-", text).strip(" .-_")[:60] or "images"


def _free(path: Path) -> Path:
    number = 2
    free = path
    while free.exists():
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1
    return free


def _publish(incoming: Path, wanted: Path) -> Path:
    """Give a folder its name; another upload may take the name at the same time."""
    number = 1
    incoming.chmod(0o755)
    while True:
        target = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        number += 1
        if not target.exists():
            try:
                return incoming.rename(target)
            except OSError:
                if not target.exists():
                    raise
