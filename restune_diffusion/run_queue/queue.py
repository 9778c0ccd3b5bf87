"""Ordered queue of training runs in a folder, which several processes may use at once."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ..training.config.config_file import config_yaml
from ..training.config.train_config import TrainConfig
from ..training.early_checks import check_before_training
from ..training.sweeps.grid import parse_sweep
from ..utils.display import printable
from ..utils.errors import SettingsError, UsageError
from .launching import command_of, process_of, send
from .records import CONFIG_FILE, LOG_FILE, Record, State, now
from .store import Entry, Store

_RESUMABLE = ("stopped", "failed", "cancelled")
_LONGEST_NAME = 200


@dataclass(frozen=True)
class QueuedRun:
    """Run of a queue, as it was when it was read.

    Attributes:
        id: number of the run; no other run of the queue gets it.
        name: name in the queue.
        state: `waiting`: starts when a device is free; also after an interruption, with a message. `running`: its
            process lives. `stopped`: interrupted on request, with a checkpoint if training had begun. `finished`: the
            tuner is written. `failed`: ended with an error, which is `message`. `cancelled`: never started.
        config: YAML file with the run's settings.
        output: output folder of the run.
        log: file with stdout and stderr of the process; missing before the first start.
        added: time at which it was added.
        started: time of the last start.
        ended: time at which the last process ended.
        pid: training process of a running run.
        message: error of a failed run, or the checkpoint from which an interrupted run continues.
        command: command of the process.
        device: device of the last start.
        stopping: whether a running run has been asked to stop.
    """

    id: str
    name: str
    state: State
    config: Path
    output: Path
    log: Path
    added: datetime
    started: datetime | None
    ended: datetime | None
    pid: int | None
    message: str | None
    command: list[str]
    device: str | None = None
    stopping: bool = False


class RunQueue:
    """Queue of training runs.

    The queue only consists of files. A `Supervisor` starts the runs. All methods may be called from several processes
    and threads at once.

    Args:
        folder: folder of the queue; created if it is missing.

    Raises:
        RestuneError: if the folder cannot be created.
    """

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)

    @property
    def folder(self) -> Path:
        """Absolute path of the queue's folder."""
        return self.store.folder

    def add(self, settings: Mapping[str, Any], *, name: str | None = None) -> QueuedRun:
        """Add a run at the end.

        Args:
            settings: settings of the run, named as in the YAML file of `restune train --config`.
            name: name in the queue; that of the output folder by default.

        Raises:
            SettingsError: if a setting is unknown, missing or invalid.
            UsageError: if the output folder is that of another run in the queue.
            RestuneError: if a check of `restune train` fails, for instance because there are no images.
        """
        wrong = next((each for each in settings if not isinstance(each, str)), None)
        if wrong is not None:
            raise SettingsError(f"{printable(repr(wrong), 100)} is not the name of a setting; give a text.")
        return self.add_config(TrainConfig(**settings), name=name)

    def add_config(self, config: TrainConfig, *, name: str | None = None) -> QueuedRun:
        """Add a run at the end; see `add`.

        Args:
            config: settings of the run.
            name: name in the queue; that of the output folder by default.
        """
        check_before_training(config)
        if config.sweep is not None:
            parse_sweep(config)
        output = config.output.expanduser().absolute()
        if output.resolve().is_relative_to(self.folder):
            raise UsageError(f"The output folder {output} lies in the queue's own folder; choose another.")
        record = Record(
            name=printable(name or output.name, _LONGEST_NAME),
            output=output,
            result=output / ("sweep.json" if config.sweep is not None else config.file.name),
            added=now(),
            resume=config.checkpoints.resume,
        )
        with self.store.locked():
            self._check_output(record)
            return _shown(self.store.create(record, config_yaml(config)))

    def runs(self) -> list[QueuedRun]:
        """Return all runs in their order; a run whose file is damaged is `failed`, with a message.

        Raises:
            RestuneError: if the file of the order is damaged.
        """
        return [_shown(entry) for entry in self.store.entries()]

    def get(self, run_id: str) -> QueuedRun:
        """Return a run.

        Raises:
            UsageError: if there is no such run.
        """
        return _shown(self.store.entry(run_id))

    def cancel(self, run_id: str, *, now: bool = False) -> None:
        """Cancel a waiting run, or interrupt a running one, which saves a checkpoint and is `stopped` afterwards.

        The process of a running run finishes its step first. A second call changes nothing.

        Args:
            run_id: number of the run.
            now: whether to kill the process of a running run at once, without a checkpoint.

        Raises:
            UsageError: if there is no such run, or it has ended.
        """
        with self.store.locked():
            entry = self.store.entry(run_id)
            record = _intact(entry)
            if record.state == "waiting":
                # A run that was interrupted has something to continue from.
                state = "stopped" if record.attempt else "cancelled"
                self.store.write(entry, record.model_copy(update={"state": state, "message": None}))
            elif record.state == "running":
                # Written first: the end of the process must not pass for an interruption by others.
                asked = record if record.stop == "sent" else record.model_copy(update={"stop": "asked"})
                self.store.write(entry, asked)
                if now:
                    send(asked, entry.folder, signal.SIGKILL)
                else:
                    self.send_stop(entry, asked)
            else:
                raise UsageError(f"Run {run_id} is {record.state} and cannot be cancelled; remove it instead.")

    def send_stop(self, entry: Entry, record: Record) -> None:
        """Send Ctrl-C to a run that was asked to stop, once; call it with the queue locked.

        A process that has just been started, or runs on another machine, is interrupted by its supervisor a moment
        later.
        """
        if record.stop == "asked" and send(record, entry.folder, signal.SIGINT):
            self.store.write(entry, record.model_copy(update={"stop": "sent"}))

    def resume(self, run_id: str) -> None:
        """Let a stopped, failed or cancelled run wait again; it keeps its place and continues from its checkpoint.

        Raises:
            UsageError: if there is no such run, it has finished, or another run uses its output folder.
        """
        with self.store.locked():
            entry = self.store.entry(run_id)
            record = _intact(entry)
            if record.state == "waiting":
                return
            if record.state not in _RESUMABLE:
                raise UsageError(
                    f"Run {run_id} is {record.state}; only a stopped, failed or cancelled run can be resumed."
                )
            self._check_output(record, run_id)
            waiting = {"state": "waiting", "message": None, "deaths": 0, "stop": "no"}
            self.store.write(entry, record.model_copy(update=waiting))

    def move(self, run_id: str, place: int) -> None:
        """Move a run to a place in the order, counted from 0; waiting runs start in this order.

        Raises:
            UsageError: if there is no such run.
        """
        with self.store.locked():
            self.store.entry(run_id)
            self.store.move(run_id, place)

    def remove(self, run_id: str) -> None:
        """Remove a run from the queue, with its log and the copy of its settings; its output folder stays.

        Raises:
            UsageError: if there is no such run, or it is running.
        """
        with self.store.locked():
            entry = self.store.entry(run_id)
            if entry.record is not None and entry.record.state == "running":
                raise UsageError(f"Run {run_id} is running; cancel it first.")
            self.store.delete(entry)

    def _check_output(self, record: Record, run_id: str | None = None) -> None:
        """Raise `UsageError` if a run that has not ended writes to the same output folder."""
        for entry in self.store.entries():
            other = entry.record
            if entry.id == run_id or other is None or other.state not in ("waiting", "running"):
                continue
            if other.output.resolve() == record.output.resolve():
                raise UsageError(
                    f"{record.output} is the output folder of run {entry.id} in the queue; choose another."
                )


def _intact(entry: Entry) -> Record:
    if entry.record is None:
        raise UsageError(str(entry.problem))
    return entry.record


def _shown(entry: Entry) -> QueuedRun:
    folder, record = entry.folder, entry.record
    if record is None:
        changed = datetime.fromtimestamp(folder.stat().st_mtime).astimezone()
        damaged = Record(name=f"run {entry.id}", output=folder, result=folder, added=changed)
        record = damaged.model_copy(update={"state": "failed", "message": entry.problem})
    process = process_of(record, folder)
    return QueuedRun(
        id=entry.id,
        name=record.name,
        state=record.state,
        config=folder / CONFIG_FILE,
        output=record.output,
        log=folder / LOG_FILE,
        added=record.added,
        started=record.started,
        ended=record.ended,
        pid=None if process is None else process.pid,
        message=record.message,
        command=command_of(record, folder),
        device=record.device,
        stopping=record.state == "running" and record.stop != "no",
    )
