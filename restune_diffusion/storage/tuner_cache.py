"""In-memory LRU cache of tuners, for a service that switches tuners between requests."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..tuners.tuner import Tuner
from ..utils.errors import RestuneError, TunerFileError
from .sources import tuner_file
from .tuner_file import load_tuner

_Stamp = tuple[int, int]


@dataclass(frozen=True)
class _Entry:
    stamp: _Stamp
    tuner: Future[Tuner]
    """Done when the file is read; concurrent requests for the same file wait for it."""


class TunerCache:
    """LRU cache of tuners on the CPU, safe to use from several threads.

    The returned tuners are the cached objects and not copies, so that a swap copies each parameter once and from
    pinned memory: read them, but do not train or move them. Attaching one attaches a copy.

    Args:
        capacity: largest number of cached tuners.
        max_bytes: largest total size of the cached parameters in bytes; a single larger tuner is read but not cached.
        pin_memory: whether to keep the parameters in page-locked memory, for the fastest copy to a GPU; None pins them
            if CUDA is available.
        dtype: dtype of the parameters; None keeps the dtype of each file.
        read: function that reads a file; defaults to `load_tuner`, which reads only the files of this package.

    Raises:
        RestuneError: if neither bound is positive, or `pin_memory` is set without CUDA.
    """

    def __init__(
        self,
        capacity: int | None = None,
        *,
        max_bytes: int | None = None,
        pin_memory: bool | None = None,
        dtype: torch.dtype | None = None,
        read: Callable[[Path], Tuner] | None = None,
    ) -> None:
        bounds = [bound for bound in (capacity, max_bytes) if bound is not None]
        if not bounds or min(bounds) < 1:
            raise RestuneError("A TunerCache needs a positive `capacity`, a positive `max_bytes`, or both.")
        if pin_memory and not torch.cuda.is_available():
            raise RestuneError("pin_memory=True needs CUDA, which is not available; omit it.")
        self.capacity = capacity
        self.max_bytes = max_bytes
        self.dtype = dtype
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._read_file = read
        self._lock = threading.Lock()
        self._entries: OrderedDict[Path, _Entry] = OrderedDict()

    def get(self, source: str | os.PathLike[str], weight_name: str | None = None, **options: Any) -> Tuner:
        """Return the tuner of a file; read the file only if it is not cached or has changed.

        Changes are detected by the file's modification time and size.

        Args:
            source: a tuner file, a folder that contains one, or a repository id on the Hub.
            weight_name: name of the file in a folder or repository.
            options: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`, as for `load_tuner_weights`.

        Returns:
            A shared tuner on the CPU: do not modify it.

        Raises:
            TunerFileError: if the file cannot be found, read or trusted; it is not cached then.
        """
        path = tuner_file(source, weight_name, **options).resolve()
        stamp = _stamp(path)
        with self._lock:
            entry = self._entries.get(path)
            is_mine = entry is None or entry.stamp != stamp
            if entry is None or is_mine:
                entry = self._entries[path] = _Entry(stamp, Future())
            self._entries.move_to_end(path)
        if is_mine:
            self._read(path, entry)
        return entry.tuner.result()

    def clear(self) -> None:
        """Empty the cache; attached tuners are not affected."""
        with self._lock:
            self._entries.clear()

    @property
    def num_bytes(self) -> int:
        """Total size of the cached parameters in bytes."""
        with self._lock:
            return sum(map(_bytes_of, self._entries.values()))

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)

    def __contains__(self, path: str | os.PathLike[str]) -> bool:
        with self._lock:
            return Path(path).resolve() in self._entries

    def _read(self, path: Path, entry: _Entry) -> None:
        """Read the file of an entry without holding the lock, so that requests for other files do not wait."""
        try:
            tuner = self._load(path)
        except BaseException as error:
            with self._lock:
                self._forget(path, entry)
            entry.tuner.set_exception(error)
            return
        with self._lock:
            entry.tuner.set_result(tuner)
            if self.max_bytes is not None and _bytes_of(entry) > self.max_bytes:
                self._forget(path, entry)
            self._evict()

    def _forget(self, path: Path, entry: _Entry) -> None:
        # The entry may have been replaced since, because the file changed.
        if self._entries.get(path) is entry:
            del self._entries[path]

    def _load(self, path: Path) -> Tuner:
        read = self._read_file
        tuner = load_tuner(path, dtype=self.dtype) if read is None else read(path).to(self.dtype)
        tuner.requires_grad_(False)
        for tensor in (*tuner.parameters(), *tuner.buffers()):
            # load_tuner may return tensors mapped from the file, which may be truncated while the tuner is cached.
            tensor.data = tensor.data.pin_memory() if self.pin_memory else tensor.data.clone()
        tuner.shared = True
        return tuner

    def _evict(self) -> None:
        """Remove the least recently used tuners until the cache is within its bounds."""
        kept = 0 if self.max_bytes is None else sum(map(_bytes_of, self._entries.values()))
        for path in list(self._entries):
            too_many = self.capacity is not None and len(self._entries) > self.capacity
            too_large = self.max_bytes is not None and kept > self.max_bytes
            if not too_many and not too_large:
                return
            kept -= _bytes_of(self._entries.pop(path))


def _bytes_of(entry: _Entry) -> int:
    """Return the size of an entry's parameters in bytes; 0 while the file is being read."""
    if not entry.tuner.done():
        return 0
    return sum(parameter.numel() * parameter.element_size() for parameter in entry.tuner.result().parameters())


def _stamp(path: Path) -> _Stamp:
    try:
        status = path.stat()
    except OSError as error:
        raise TunerFileError(f"{path} cannot be read: {error.strerror}.") from error
    return status.st_mtime_ns, status.st_size
