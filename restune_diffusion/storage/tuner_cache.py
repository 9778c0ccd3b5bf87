"""Keep the tuners that were used last in memory, for a service that changes them between requests."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
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
    """Done when the file is read; whoever asks for it meanwhile waits for the same one."""


class TunerCache:
    """The tuners that were asked for last, on the CPU; safe to use from several threads.

    The tuners that it hands out are its own, so that a swap copies no parameter twice and copies from pinned memory:
    read them, but do not train or move them. Attaching one attaches a copy.

    Args:
        capacity: how many tuners to keep.
        max_bytes: how many bytes of parameters to keep; a tuner that is larger alone is read but not kept.
        pin_memory: whether to hold them in page-locked memory, from which a GPU copies fastest; None means where CUDA
            is available.
        dtype: dtype of the parameters; None keeps each file's.

    Raises:
        RestuneError: if there is no positive bound, or memory cannot be pinned here.
    """

    def __init__(
        self,
        capacity: int | None = None,
        *,
        max_bytes: int | None = None,
        pin_memory: bool | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        bounds = [bound for bound in (capacity, max_bytes) if bound is not None]
        if not bounds or min(bounds) < 1:
            raise RestuneError("A TunerCache needs a positive `capacity`, a positive `max_bytes`, or both.")
        if pin_memory and not torch.cuda.is_available():
            raise RestuneError("pin_memory=True needs CUDA, which is not available here; leave it out.")
        self.capacity = capacity
        self.max_bytes = max_bytes
        self.dtype = dtype
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._lock = threading.Lock()
        self._entries: OrderedDict[Path, _Entry] = OrderedDict()

    def get(self, source: str | os.PathLike[str], weight_name: str | None = None, **options: Any) -> Tuner:
        """Return the tuner of a file, read again only if it is not kept or the file has changed.

        A change is seen by the file's time of modification and its size.

        Args:
            source: a tuner file, a folder that holds one, or a repository id on the Hub.
            weight_name: name of the file in a folder or repository.
            options: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`, as for `load_tuner_weights`.

        Returns:
            A tuner on the CPU that others share: do not change it.

        Raises:
            TunerFileError: if the file cannot be found, read or trusted; nothing is kept of it.
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
        """Forget all tuners; those that are attached stay as they are."""
        with self._lock:
            self._entries.clear()

    @property
    def num_bytes(self) -> int:
        """Bytes of the parameters that are kept."""
        with self._lock:
            return sum(map(_bytes_of, self._entries.values()))

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)

    def __contains__(self, path: str | os.PathLike[str]) -> bool:
        with self._lock:
            return Path(path).resolve() in self._entries

    def _read(self, path: Path, entry: _Entry) -> None:
        """Fill an entry outside the lock, so that other files are not kept waiting."""
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
        # The file may have changed meanwhile, and another entry be in its place.
        if self._entries.get(path) is entry:
            del self._entries[path]

    def _load(self, path: Path) -> Tuner:
        tuner = load_tuner(path, dtype=self.dtype).requires_grad_(False)
        for parameter in tuner.parameters():
            # What load_tuner returns may be mapped from the file, which somebody may cut short while it is kept here.
            parameter.data = parameter.data.pin_memory() if self.pin_memory else parameter.data.clone()
        tuner.shared = True
        return tuner

    def _evict(self) -> None:
        """Forget the tuners that were not used for longest, until what is left is within the bounds."""
        kept = sum(map(_bytes_of, self._entries.values()))
        for path in list(self._entries):
            too_many = self.capacity is not None and len(self._entries) > self.capacity
            too_large = self.max_bytes is not None and kept > self.max_bytes
            if not too_many and not too_large:
                return
            kept -= _bytes_of(self._entries.pop(path))


def _bytes_of(entry: _Entry) -> int:
    """Bytes of an entry's parameters; none while it is being read."""
    if not entry.tuner.done():
        return 0
    return sum(parameter.numel() * parameter.element_size() for parameter in entry.tuner.result().parameters())


def _stamp(path: Path) -> _Stamp:
    try:
        status = path.stat()
    except OSError as error:
        raise TunerFileError(f"{path} cannot be read: {error.strerror}.") from error
    return status.st_mtime_ns, status.st_size
