"""State of a run, from the files in its folder and in its output folder."""

from __future__ import annotations

import signal
from pathlib import Path

from ..training.output_folder import latest_checkpoint
from .locks import is_held
from .records import EXIT_FILE, LOCK_FILE, LOG_FILE, ExitRecord, Record, now, read_of_attempt

MOST_DEATHS = 3
"""Number of starts without a new checkpoint after which an interrupted run is not started again."""
_CTRL_C = (130, -signal.SIGINT)
# The end of a machine's session, a lack of memory, or an administrator; none is a fault of the run.
_INTERRUPTIONS = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP)
_CLOCK_SECONDS = 2


def settled(record: Record, folder: Path) -> Record:
    """Return the record with the present state of a run that was started.

    Args:
        record: record of the run, as on the disk.
        folder: folder of the run in the queue.
    """
    if record.state != "running" or is_held(folder / LOCK_FILE):
        return record
    ending = read_of_attempt(folder / EXIT_FILE, ExitRecord, record.attempt)
    code = None if ending is None else ending.code
    ended = now() if ending is None else ending.ended
    changes = {"ended": ended, "stop": "no", "message": None}
    if code in (None, 0) and _is_written(record):
        return record.model_copy(update={**changes, "state": "finished", "deaths": 0})
    changes["resume"] = True
    # A process that SIGTERM asks to stop saves a checkpoint and exits with 0.
    interrupted = code in (None, 0, *_INTERRUPTIONS)
    if code in _CTRL_C or (record.stop != "no" and interrupted):
        return record.model_copy(update={**changes, "state": "stopped", "deaths": 0})
    if interrupted:
        deaths = 0 if checkpoints_of(record.output) != record.reached else record.deaths + 1
        if deaths < MOST_DEATHS:
            saved = latest_checkpoint(record.output)
            start = "from the beginning" if saved is None else f"from {saved.name}"
            message = f"The run was interrupted; it continues {start}."
            return record.model_copy(update={**changes, "state": "waiting", "deaths": deaths, "message": message})
        message = (
            f"The process ended {MOST_DEATHS} times without a new checkpoint and without an error, as if memory ran "
            f"out; read {folder / LOG_FILE}, lower the batch size, or save checkpoints more often."
        )
        return record.model_copy(update={**changes, "state": "failed", "deaths": 0, "message": message})
    message = ending.message if ending is not None and ending.message else "The process wrote no message."
    if code is not None and code < 0:
        message = f"The process crashed ({signal.strsignal(-code)}); read {folder / LOG_FILE}."
    return record.model_copy(update={**changes, "state": "failed", "deaths": 0, "message": message})


def checkpoints_of(output: Path) -> str:
    """Return the names of the newest checkpoints of a run and of the runs of a sweep, to compare them later."""
    folders = [output, *sorted(path for path in output.glob("*") if path.is_dir())]
    newest = [latest_checkpoint(folder) for folder in folders]
    return " ".join(str(path.relative_to(output)) for path in newest if path is not None)


def _is_written(record: Record) -> bool:
    """Return whether the last start of a run has written the file that a run writes last."""
    try:
        written = record.result.stat().st_mtime
    except OSError:
        return False
    return record.started is not None and written >= record.started.timestamp() - _CLOCK_SECONDS
