"""File locks that end with the process that holds them, also after `kill -9` and a reboot."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..utils.errors import RestuneError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_POLL_SECONDS = 0.01


def acquire(path: Path, seconds: float) -> int | None:
    """Lock a file and return its descriptor; closing all copies of the descriptor releases the lock.

    A child process that inherits the descriptor holds the lock too.

    Args:
        path: path of the file; created if it is missing.
        seconds: time to wait for another holder; None is returned afterwards.

    Raises:
        RestuneError: if the file cannot be opened, or the system has no such locks.
    """
    handle = _opened(path)
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(handle)
                return None
            time.sleep(_POLL_SECONDS)


def is_held(path: Path) -> bool:
    """Return whether a living process holds the lock of a file."""
    if not path.exists():
        return False
    handle = _opened(path)
    try:
        # A shared lock, so that two processes that ask at once do not take each other for the holder.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


@contextmanager
def locked(path: Path, seconds: float = 30) -> Iterator[None]:
    """Context manager that holds the lock of a file.

    Raises:
        RestuneError: if another process holds it for longer than the given time.
    """
    handle = acquire(path, seconds)
    if handle is None:
        raise RestuneError(f"Another process has held {path} for {seconds:g} s; end that process and try again.")
    try:
        yield
    finally:
        os.close(handle)


def _opened(path: Path) -> int:
    if fcntl is None:
        raise RestuneError("The queue of runs needs Linux or macOS; run `restune train` for each run instead.")
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise RestuneError(
            f"{path} cannot be opened ({error.strerror}); change its permissions, or choose another queue folder."
        ) from error
