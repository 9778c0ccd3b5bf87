from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from restune_diffusion.run_queue import QueuedRun, RunQueue, Supervisor, living_supervisor
from restune_diffusion.storage.base_files.location import BUNDLED_BASE
from restune_diffusion.training import TrainConfig, train

from ... import tiny_training as tiny

STEPS = 12
WAIT_SECONDS = 240


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_images(tmp_path_factory.mktemp("queued") / "discs")


@pytest.fixture
def settings(images: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Function that returns the settings of a short run by the name of its output folder."""

    def make(name: str, **changes: Any) -> dict[str, Any]:
        return {
            "base": str(BUNDLED_BASE),
            "data": str(images),
            "output": str(tmp_path / name),
            "steps": STEPS,
            "resolution": 64,
            "cpu": True,
            "log_with": "none",
            "learning_rate": 1e-3,
            **changes,
        }

    return make


@pytest.fixture(scope="session")
def uninterrupted(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tuner file of the run that the others are compared with."""
    output = tmp_path_factory.mktemp("uninterrupted") / "out"
    config = TrainConfig(base=str(BUNDLED_BASE), data=images, output=output, steps=STEPS, resolution=64, cpu=True,
                         log_with="none", learning_rate=1e-3, checkpoint_every=0)  # fmt: skip
    return train(config, verbose=False).path


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunQueue]:
    """Queue whose processes end with the test."""
    # One thread, because all processes must round identically.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    queue = RunQueue(tmp_path / "queue")
    yield queue
    supervisor = living_supervisor(queue.folder)
    if supervisor is not None and supervisor != os.getpid():
        os.kill(supervisor, signal.SIGKILL)
    for run in queue.runs():
        if run.state == "running":
            queue.cancel(run.id, now=True)


@pytest.fixture
def supervised(queue: RunQueue) -> Iterator[RunQueue]:
    """Queue with a supervisor in a thread of the test."""
    supervisor = Supervisor(queue, ("cpu",))
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    yield queue
    supervisor.stop()
    thread.join()


def wait_for(condition: Callable[[], Any], what: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.02)


def wait_for_state(queue: RunQueue, run_id: str, state: str) -> QueuedRun:
    def what() -> object:
        run = queue.get(run_id)
        return run, run.log.read_text() if run.log.exists() else ""

    def reached() -> bool:
        run = queue.get(run_id)
        assert run.state in (state, "waiting", "running") or (state == "finished" and run.state == "stopped"), what()
        return run.state == state

    wait_for(reached, what)
    return queue.get(run_id)


def steps_of(run: QueuedRun) -> int:
    log = run.output / "metrics.jsonl"
    return log.read_text().count("\n") if log.is_file() else 0
