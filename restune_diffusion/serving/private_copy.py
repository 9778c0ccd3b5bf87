"""Copies of tuner files that nobody else writes to while they are read.

safetensors maps a file into memory. One that is cut short in place at that moment, as `cp` does to a file that it
overwrites, would end the whole server with SIGBUS.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from ..utils.errors import RestuneError, TunerFileError

_LENGTH_BYTES = 8


@contextmanager
def private_copy(path: Path) -> Iterator[Path]:
    """Context manager that gives a copy of a file, and removes it at the end.

    Tensors that are still mapped from the copy stay valid. Errors raised inside name the original.

    Raises:
        TunerFileError: if the file cannot be read or copied.
    """
    with _copied(path, shutil.copyfileobj) as copy:
        yield copy


@contextmanager
def private_header(path: Path) -> Iterator[Path]:
    """Context manager that gives a file of the same size with the same header, whose tensors are zero.

    It costs no more than the header, where the file system keeps holes. Errors raised inside name the original.

    Raises:
        TunerFileError: if the file cannot be read or copied.
    """
    with _copied(path, _copy_header) as copy:
        yield copy


def _copy_header(source: IO[bytes], target: IO[bytes]) -> None:
    from ..storage.header import MAX_HEADER_BYTES

    length = source.read(_LENGTH_BYTES)
    # The reader refuses a longer header by its length alone.
    header = source.read(min(int.from_bytes(length, "little"), MAX_HEADER_BYTES))
    target.write(length + header)
    target.truncate(max(os.fstat(source.fileno()).st_size, target.tell()))


@contextmanager
def _copied(path: Path, copy: Callable[[IO[bytes], IO[bytes]], None]) -> Iterator[Path]:
    with TemporaryDirectory(prefix="restune-") as folder:
        own = Path(folder, path.name)
        try:
            # A pipe or a device could block forever.
            if not path.is_file():
                raise TunerFileError(f"There is no tuner file at {path}.")
            with path.open("rb") as source, own.open("wb") as target:
                copy(source, target)
            yield own
        except OSError as error:
            raise TunerFileError(f"{path} cannot be read: {error.strerror or error}.") from error
        except RestuneError as error:
            raise type(error)(str(error).replace(str(own), str(path))) from error
