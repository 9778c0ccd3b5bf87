"""State of a run from the files that its processes leave behind."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from restune_diffusion.run_queue.locks import acquire, is_held
from restune_diffusion.run_queue.process import last_error
from restune_diffusion.run_queue.records import EXIT_FILE, LOCK_FILE, ExitRecord, Record, now, write_record
from restune_diffusion.run_queue.states import MOST_DEATHS, settled


def run(tmp_path: Path, code: int | None, *, result: bool = False, attempt: int = 2, **changes: Any) -> Record:
    """Return the settled record of a run whose second process has ended with an exit code, or without a record."""
    output = tmp_path / "out"
    output.mkdir(exist_ok=True)
    record = Record(name="x", output=output, result=output / "tuner.safetensors", added=now())
    record = record.model_copy(update={"state": "running", "attempt": 2, "started": now(), **changes})
    if result:
        record.result.touch()
    if code is not None:
        write_record(tmp_path / EXIT_FILE, ExitRecord(attempt=attempt, code=code, ended=now(), message="It is so."))
    return settled(record, tmp_path)


@pytest.mark.parametrize(
    ("code", "result", "stop", "state", "message"),
    [
        (0, True, "no", "finished", None),
        (0, True, "sent", "finished", None),
        (None, True, "no", "finished", None),
        (130, False, "sent", "stopped", None),
        (130, False, "no", "stopped", None),
        (-signal.SIGINT, False, "sent", "stopped", None),
        (-signal.SIGKILL, False, "sent", "stopped", None),
        (None, False, "asked", "stopped", None),
        # SIGTERM at the end of a session: a checkpoint, and no tuner.
        (0, False, "no", "waiting", "The run was interrupted; it continues from the beginning."),
        (None, False, "no", "waiting", "The run was interrupted; it continues from the beginning."),
        (-signal.SIGKILL, False, "no", "waiting", "The run was interrupted; it continues from the beginning."),
        (-signal.SIGTERM, False, "no", "waiting", "The run was interrupted; it continues from the beginning."),
        (1, False, "no", "failed", "It is so."),
        (2, False, "sent", "failed", "It is so."),
    ],
)
def test_the_exit_decides_on_the_state(
    tmp_path: Path, code: int | None, result: bool, stop: str, state: str, message: str | None
) -> None:
    found = run(tmp_path, code, result=result, stop=stop)
    assert (found.state, found.message, found.stop) == (state, message, "no")
    assert found.resume == (state != "finished")
    assert found.ended is not None


def test_a_crash_names_the_signal_and_the_log(tmp_path: Path) -> None:
    found = run(tmp_path, -signal.SIGSEGV)
    assert (found.state, found.message) == (
        "failed",
        f"The process crashed (Segmentation fault); read {tmp_path / 'log.txt'}.",
    )


def test_an_exit_of_an_earlier_process_does_not_count(tmp_path: Path) -> None:
    assert run(tmp_path, 1, attempt=1).state == "waiting"


def test_a_tuner_of_an_earlier_run_does_not_count(tmp_path: Path) -> None:
    later = now() + timedelta(seconds=60)
    assert run(tmp_path, 0, result=True, started=later).state == "waiting"


def test_a_run_that_is_killed_again_and_again_without_a_checkpoint_fails(tmp_path: Path) -> None:
    record = run(tmp_path, -signal.SIGKILL, deaths=MOST_DEATHS - 2)
    assert (record.state, record.deaths) == ("waiting", MOST_DEATHS - 1)
    record = run(tmp_path, -signal.SIGKILL, deaths=MOST_DEATHS - 1)
    assert record.state == "failed"
    assert record.message is not None
    assert record.message.startswith("The process ended 3 times without a new checkpoint and without an error")
    (tmp_path / "out" / "checkpoint-000500").mkdir()
    record = run(tmp_path, -signal.SIGKILL, deaths=MOST_DEATHS - 1)
    assert (record.state, record.deaths) == ("waiting", 0)
    assert record.message == "The run was interrupted; it continues from checkpoint-000500."
    assert run(tmp_path, -signal.SIGKILL, deaths=MOST_DEATHS - 1, reached="checkpoint-000500").state == "failed"


def test_checkpoints_of_the_runs_of_a_sweep_count(tmp_path: Path) -> None:
    (tmp_path / "out" / "tuner-lr1e-4" / "checkpoint-000500").mkdir(parents=True)
    assert run(tmp_path, None, deaths=MOST_DEATHS - 1).deaths == 0


def test_a_run_lives_while_any_of_its_processes_holds_the_lock(tmp_path: Path) -> None:
    lock = acquire(tmp_path / LOCK_FILE, 0)
    assert lock is not None
    assert acquire(tmp_path / LOCK_FILE, 0.05) is None
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        os.close(lock)
        assert is_held(tmp_path / LOCK_FILE)
        assert run(tmp_path, 1).state == "running"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not is_held(tmp_path / LOCK_FILE)
    assert run(tmp_path, 1).state == "failed"


@pytest.mark.parametrize(
    ("log", "error"),
    [
        (b"restune: of before\nrestune: x fails; do y.\n\r  0%|  | 0/3\r 50%|\n", "x fails; do y."),
        (b"plan\nTraceback (most recent call last):\nRuntimeError: shapes\n\n", "RuntimeError: shapes"),
        (b"restune: \x1b[2J evil\xff\n", "\\x1b[2J evil\ufffd"),
        (b"\n", None),
    ],
)
def test_the_message_is_the_last_error_in_the_log(tmp_path: Path, log: bytes, error: str | None) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(b"x" * 100_000 + b"\nrestune: of the process before\n")
    start = path.stat().st_size
    with path.open("ab") as file:
        file.write(log)
    assert last_error(path, start) == error
    assert last_error(tmp_path / "none") is None
