from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from restune_diffusion.run_queue import QueuedRun, RunQueue, Supervisor, launching
from restune_diffusion.storage.base_files.location import BUNDLED_BASE

# Begins like a training process: it writes its files only at the end, and counts how often it is interrupted.
START = """
import os, signal, sys, time
from pathlib import Path
output, interrupted = Path(sys.argv[1]), []
output.mkdir(exist_ok=True)
signal.signal(signal.SIGINT, lambda *_: interrupted.append(1))
def checkpoint(step):
    (output / f"checkpoint-{step:06d}").mkdir()
def finish():
    (output / "tuner.safetensors").touch()
(output / f"started-{os.getpid()}").touch()
"""
UNTIL_INTERRUPTED = """
while not interrupted:
    time.sleep(0.01)
time.sleep(0.3)
(output / "interruptions").write_text(str(len(interrupted)))
checkpoint(5)
sys.exit(130)
"""
Scripts = dict[str, str]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.fixture
def settings(data: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Function that returns settings by the name of the output folder."""

    def make(name: str, **changes: Any) -> dict[str, Any]:
        return {"base": str(BUNDLED_BASE), "data": str(data), "output": str(tmp_path / name), **changes}

    return make


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[RunQueue]:
    """Queue whose processes end with the test."""
    queue = RunQueue(tmp_path / "queue")
    yield queue
    for run in queue.runs():
        if run.state == "running":
            queue.cancel(run.id, now=True)
            wait_for(lambda run=run: queue.get(run.id).state != "running")  # type: ignore[misc]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Scripts:
    """Scripts by the name of the output folder, which supervisors in this process start instead of training."""
    found: Scripts = {}

    def command(record: Any, folder: Path) -> list[str]:
        return [sys.executable, "-c", START + found[record.output.name], str(record.output)]

    monkeypatch.setattr(launching, "command_of", command)
    return found


@pytest.fixture
def supervise(queue: RunQueue) -> Iterator[Callable[..., Supervisor]]:
    """Function that starts a supervisor in a thread."""
    started: list[tuple[Supervisor, threading.Thread]] = []

    def start(*devices: str) -> Supervisor:
        supervisor = Supervisor(queue, devices or ("auto",))
        thread = threading.Thread(target=supervisor.run)
        thread.start()
        started.append((supervisor, thread))
        return supervisor

    yield start
    for supervisor, thread in started:
        supervisor.stop()
        thread.join()


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_state(queue: RunQueue, run_id: str, state: str) -> QueuedRun:
    wait_for(lambda: queue.get(run_id).state == state)
    return queue.get(run_id)
