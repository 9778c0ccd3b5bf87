"""Supervisor in a process of its own: `python -m restune_diffusion.run_queue.background FOLDER DEVICE...`."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..utils.errors import RestuneError
from .launching import check_devices
from .process import last_error
from .queue import RunQueue
from .supervisor import Supervisor, living_supervisor

LOG_FILE = "supervisor.log"
IDLE_SECONDS = 60
"""Time without a waiting or running run after which the process ends."""
_START_SECONDS = 60


def ensure_supervisor(folder: Path, devices: Sequence[str] = ("auto",)) -> int:
    """Start a supervisor of a queue in the background unless one lives, and return its process.

    It survives the end of this process, and ends itself after a minute without work. So call this after `RunQueue.add`
    and `RunQueue.resume`, not only once.

    Args:
        folder: folder of the queue.
        devices: devices of a new supervisor, as of `Supervisor`.

    Raises:
        RestuneError: if it cannot be started.
    """
    check_devices(devices)
    folder = RunQueue(folder).folder
    living = living_supervisor(folder)
    if living is not None:
        return living
    log = folder / LOG_FILE
    start = log.stat().st_size if log.exists() else 0
    try:
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "restune_diffusion.run_queue.background", str(folder), *devices],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except OSError as error:
        raise RestuneError(f"The supervisor of the queue cannot be started ({error.strerror}).") from error
    deadline = time.monotonic() + _START_SECONDS
    while (living := living_supervisor(folder)) is None:
        ended = process.poll()
        # Another process may have started one at the same time; then this one has ended, and that one lives.
        if (ended is not None and living_supervisor(folder) is None) or time.monotonic() > deadline:
            raise RestuneError(
                f"The supervisor of the queue did not start: {last_error(log, start) or 'it wrote no message.'}"
            )
        time.sleep(0.02)
    return living


def main(folder: Path, devices: Sequence[str]) -> int:
    """Supervise a queue until it has been idle for a minute, and return the exit code.

    Args:
        folder: folder of the queue.
        devices: devices of the supervisor.
    """
    try:
        Supervisor(RunQueue(folder), devices).run(idle_seconds=IDLE_SECONDS)
    except RestuneError as error:
        print(f"restune: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
