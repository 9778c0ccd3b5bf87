"""Loop that starts the runs of a queue, one for each device."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType

from ..utils.errors import RestuneError
from .launching import check_devices, launch, lock_run
from .locks import acquire, is_held
from .queue import QueuedRun, RunQueue
from .records import Record, State, now
from .states import checkpoints_of
from .store import Entry

LOCK_FILE = "supervisor.lock"
_POLL_SECONDS = 0.25


def living_supervisor(folder: Path) -> int | None:
    """Return the process of the supervisor that works on a queue, or None.

    Args:
        folder: folder of the queue.
    """
    path = folder.expanduser() / LOCK_FILE
    for _ in range(100):
        if not is_held(path):
            return None
        # Its holder writes its number a moment after it has locked the file.
        text = path.read_text()
        if text.isdecimal():
            return int(text)
        time.sleep(0.01)
    return None


class Supervisor:
    """Starts the waiting runs of a queue in their order, one for each device, until it is stopped.

    Each run is a process in a session of its own, which lives on when the supervisor ends or is killed. The next
    supervisor finds it again. A run that was interrupted by others, for instance by a reboot, is started again and
    continues from its newest checkpoint.

    Args:
        queue: the queue.
        devices: device of each run at a time: `auto` leaves the choice to the run, `cpu`, or a GPU such as `cuda:0`. A
            name may occur several times.
        on_change: called with each run whose state has changed, and at first with those that are running.

    Raises:
        UsageError: if a device is not valid.
    """

    def __init__(
        self, queue: RunQueue, devices: Sequence[str] = ("auto",), on_change: Callable[[QueuedRun], None] | None = None
    ) -> None:
        self.queue = queue
        self.devices = check_devices(devices)
        self._on_change = on_change
        self._seen: dict[str, tuple[State, datetime | None]] = {}
        self._stop = threading.Event()
        self._children: list[subprocess.Popen[bytes]] = []

    def run(self, *, until_empty: bool = False, idle_seconds: float | None = None) -> None:
        """Start runs until Ctrl-C, SIGTERM or `stop`, all of which leave the running runs alone.

        Args:
            until_empty: whether to return as soon as no run is waiting or running.
            idle_seconds: time after which to return if no run is waiting or running; without a limit by default.

        Raises:
            RestuneError: if another supervisor works on the queue.
        """
        lock = self._lock()
        limit = 0.0 if until_empty else idle_seconds
        idle_since = time.monotonic()
        try:
            with self._listening():
                while not self._stop.is_set():
                    # The end is decided with the queue locked: a run that is added afterwards finds no supervisor.
                    with self.queue.store.locked():
                        if self._advance():
                            idle_since = time.monotonic()
                        elif limit is not None and time.monotonic() - idle_since >= limit:
                            os.close(lock)
                            lock = -1
                            break
                    self._report()
                    self._stop.wait(_POLL_SECONDS)
            self._report()
        finally:
            if lock >= 0:
                os.close(lock)

    def stop(self) -> None:
        """Let `run` return; the running runs go on."""
        self._stop.set()

    def _lock(self) -> int:
        path = self.queue.folder / LOCK_FILE
        lock = acquire(path, 1)
        if lock is None:
            other = living_supervisor(path.parent)
            raise RestuneError(
                f"Process {other} already works on the queue {path.parent}; leave the runs to it, or end it first."
            )
        os.ftruncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())
        return lock

    def _advance(self) -> bool:
        """Update the states, start runs on free devices, and return whether any run is waiting or running."""
        self._children = [child for child in self._children if child.poll() is None]
        store = self.queue.store
        entries = [(entry, entry.record) for entry in store.entries()]
        free = list(self.devices)
        for entry, record in entries:
            if record is None:
                continue
            if record != entry.saved:
                store.write(entry, record)
            if record.state == "running":
                self.queue.send_stop(entry, record)
                if free:
                    # A run that a supervisor with other devices started takes the place of one here.
                    free.remove(record.device if record.device in free else free[0])
        waiting = [(entry, record) for entry, record in entries if record is not None and record.state == "waiting"]
        for device, (entry, record) in zip(free, waiting, strict=False):
            self._start(entry, record, device)
        return any(record is not None and record.state in ("waiting", "running") for _, record in entries)

    def _report(self) -> None:
        if self._on_change is None:
            return
        for run in self.queue.runs():
            ended = run.state not in ("waiting", "running")
            before = self._seen.get(run.id, (run.state, run.started) if ended else ("waiting", None))
            self._seen[run.id] = (run.state, run.started)
            # A run that was interrupted and started again is running as before.
            if run.state != before[0] or (run.state == "running" and run.started != before[1]):
                self._on_change(run)

    def _start(self, entry: Entry, record: Record, device: str) -> None:
        starting = record.model_copy(
            update={
                "state": "running",
                "attempt": record.attempt + 1,
                "device": device,
                "stop": "no",
                "started": now(),
                "ended": None,
                "reached": checkpoints_of(record.output),
            }
        )
        try:
            # A running run whose lock is free has ended, so the lock comes first.
            lock = lock_run(entry.folder)
            self.queue.store.write(entry, starting)
            self._children.append(launch(starting, entry.folder, lock))
        except RestuneError as error:
            failed = {"state": "failed", "ended": now(), "message": str(error)}
            self.queue.store.write(entry, starting.model_copy(update=failed))

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Context manager in which Ctrl-C and SIGTERM end `run`; only in the main thread, as Python requires."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: FrameType | None) -> None:
            self._stop.set()

        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for number, handler in before.items():
                # As in the background of a shell, where Ctrl-C is for others.
                if handler is not signal.SIG_IGN:
                    signal.signal(number, stop)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
