"""Files of one run in the queue's folder: its record, its process, and its exit."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ..utils.atomic_write import atomic_write
from ..utils.errors import RestuneError

State: TypeAlias = Literal["waiting", "running", "stopped", "finished", "failed", "cancelled"]

RECORD_FILE = "run.json"
CONFIG_FILE = "config.yaml"
LOG_FILE = "log.txt"
LOCK_FILE = "process.lock"
"""Locked by the processes of a run for as long as one of them lives."""
PROCESS_FILE = "process.json"
EXIT_FILE = "exit.json"


class _File(BaseModel):
    # Names of later releases are ignored.
    model_config = ConfigDict(extra="ignore", frozen=True)


class Record(_File):
    """Record of a run; only holders of the queue's lock write it.

    Attributes:
        name: name in the queue.
        output: output folder.
        result: file that the run writes last; shows that it has finished.
        state: state when the record was written; it is `running` until the end of the process is read.
        attempt: number of times that the process was started.
        resume: whether the next start continues from the newest checkpoint.
        device: device of the last start.
        stop: whether the process must be interrupted, or has been.
        reached: newest checkpoints at the last start.
        deaths: number of starts in a row that were interrupted without a new checkpoint.
    """

    name: str
    output: Path
    result: Path
    added: datetime
    state: State = "waiting"
    attempt: int = 0
    resume: bool = False
    device: str | None = None
    stop: Literal["no", "asked", "sent"] = "no"
    started: datetime | None = None
    ended: datetime | None = None
    message: str | None = None
    reached: str = ""
    deaths: int = 0


class ProcessRecord(_File):
    """Process of a run: `group` leads the session in which the training process `pid` runs, on the machine `host`."""

    attempt: int
    host: str
    group: int
    pid: int


class ExitRecord(_File):
    """End of a training process: exit code, or the negative number of the signal that ended it."""

    attempt: int
    code: int
    ended: datetime
    message: str | None = None


Content = TypeVar("Content", bound=BaseModel)


def read_record(path: Path, model: type[Content]) -> Content:
    """Read a file of the queue.

    Raises:
        RestuneError: if the file is missing or damaged.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RestuneError(f"{path} cannot be read ({error.strerror}); remove the run from the queue.") from error
    except ValidationError as error:
        raise RestuneError(f"{path} is damaged; remove the run from the queue and add it again.") from error


def read_of_attempt(path: Path, model: type[Content], attempt: int) -> Content | None:
    """Return the content of a file that the process of a run wrote, or None if an earlier process did."""
    try:
        found = read_record(path, model)
    except RestuneError:
        # A process that was killed may have written none.
        return None
    return found if getattr(found, "attempt", None) == attempt else None


def write_record(path: Path, record: BaseModel) -> None:
    """Write a file of the queue.

    Raises:
        TunerFileError: if the file cannot be written.
    """
    with atomic_write(path) as file:
        file.write((record.model_dump_json(indent=2) + "\n").encode())


def now() -> datetime:
    """Return the present time."""
    return datetime.now(UTC)
