"""Stop child processes as long as other processes compute.

The scheduler's idle class is not enough: a program with a thread per core waits at each of its barriers for the thread
whose core was taken, and took seven times as long beside one process of that class (`restune demo`, two cores).
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

import psutil

MOST_BUSY = 0.3
"""Cores that other processes may use while the children run."""
_INTERVAL = 0.5
_CALM = 4
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>


class Yielding:
    """Context manager that stops the children of this process while others compute, and resumes them at the end.

    Children must have a positive nice value, because the system counts niced time apart.

    Args:
        measure: function that waits and returns how many cores others have used; `others_in_interval` if None.
    """

    def __init__(self, measure: Callable[[], float] | None = None) -> None:
        self._measure = measure or others_in_interval
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Yielding:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        calm = _CALM
        try:
            while not self._ended.is_set():
                calm = calm + 1 if self._measure() <= MOST_BUSY else 0
                if calm == 0:
                    for_each_child(psutil.Process.suspend)
                elif calm >= _CALM:
                    for_each_child(psutil.Process.resume)
        finally:
            for_each_child(psutil.Process.resume)


def for_each_child(action: Callable[[psutil.Process], None]) -> None:
    """Call a function with each living descendant of this process."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended
            action(child)


def others_in_interval() -> float:
    """Wait half a second, and return how many cores processes without a positive nice value used in it."""
    before, started = psutil.cpu_times(), time.monotonic()
    time.sleep(_INTERVAL)
    after = psutil.cpu_times()
    used = after.user - before.user + after.system - before.system
    return used / (time.monotonic() - started)


def die_with_parent() -> None:
    """Let the system kill this process when its parent ends; a stopped process could not do it itself."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
