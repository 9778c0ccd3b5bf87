"""Process that runs one training command and records how it ended: `python -m restune_diffusion.run_queue.process`.

It is the parent of the training process, so the exit is recorded whether or not a supervisor lives.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from socket import gethostname

from ..utils.display import printable
from .records import EXIT_FILE, LOG_FILE, PROCESS_FILE, ExitRecord, ProcessRecord, now, write_record

_TAIL_BYTES = 1 << 16
_LONGEST = 1000
_OUR_ERROR = "restune: "


def main(folder: Path, attempt: int, lock: int, command: Sequence[str]) -> int:
    """Run a command, write its process and its exit to the run's folder, and return its exit code.

    Args:
        folder: folder of the run in the queue.
        attempt: number of the start.
        lock: descriptor of the locked file of the run; the command inherits it.
        command: the command.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A handler that does nothing instead of SIG_IGN, which the command would inherit.
        signal.signal(number, lambda *_: None)
    log = folder / LOG_FILE
    start = log.stat().st_size if log.exists() else 0
    message: str | None = None
    try:
        process = subprocess.Popen(command, pass_fds=(lock,))
    except OSError as error:
        code, message = 127, f"{command[0]} cannot be started: {error.strerror}."
    else:
        write_record(
            folder / PROCESS_FILE,
            ProcessRecord(attempt=attempt, host=gethostname(), group=os.getpid(), pid=process.pid),
        )
        code = process.wait()
        message = last_error(log, start)
    write_record(folder / EXIT_FILE, ExitRecord(attempt=attempt, code=code, ended=now(), message=message))
    return code


def last_error(log: Path, start: int = 0) -> str | None:
    """Return the last error message of the command line in a log, or else the last line; None if it is empty.

    Args:
        log: path of the log.
        start: position at which to start reading.
    """
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - _TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return None
    # A progress bar ends its lines with a carriage return.
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    ours = [line.removeprefix(_OUR_ERROR) for line in lines if line.startswith(_OUR_ERROR)]
    return next((printable(each[-1], _LONGEST) for each in (ours, lines) if each), None)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
