"""Training runs of a queue: in order, cancelled, resumed, and after `kill -9` of any of the processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from restune_diffusion.run_queue import RunQueue, ensure_supervisor, living_supervisor
from restune_diffusion.training.output_folder import list_checkpoints

from ...training_fixtures import start_script
from ...unit.training.test_train import assert_same
from .conftest import STEPS, steps_of, wait_for, wait_for_state

MakeSettings = Callable[..., dict[str, Any]]
# Adds runs: settings as JSON, folder of the queue, name.
ADDS = """
import json, sys
from pathlib import Path
from restune_diffusion.run_queue import RunQueue
settings, folder, name = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
for number in range(12):
    RunQueue(folder).add({**settings, "output": f"{settings['output']}-{name}-{number}"}, name=name)
"""


def kill_supervisor(queue: RunQueue, process: int) -> None:
    os.kill(process, signal.SIGKILL)
    wait_for(lambda: living_supervisor(queue.folder) != process, lambda: process)


def test_runs_start_in_order_and_a_cancelled_one_is_resumed_to_the_same_tuner(
    supervised: RunQueue, settings: MakeSettings, uninterrupted: Path, images: Path, tmp_path: Path
) -> None:
    queue = supervised
    shutil.copytree(images, tmp_path / "images")
    # The second comes first: it is cancelled before the others wait for it.
    second = queue.add(settings("second"), name="the second")
    third = queue.add(settings("third", data=str(tmp_path / "images")))
    shutil.rmtree(tmp_path / "images")
    fourth = queue.add(settings("fourth", steps=2))
    assert [run.id for run in queue.runs()] == [second.id, third.id, fourth.id]

    wait_for(lambda: steps_of(second) >= 2, lambda: second.log.read_text())
    running = queue.get(second.id)
    assert (running.state, running.name, queue.get(third.id).state) == ("running", "the second", "waiting")
    queue.cancel(second.id)
    assert queue.get(second.id).stopping
    stopped = wait_for_state(queue, second.id, "stopped")
    (checkpoint,) = list_checkpoints(second.output)
    assert 2 <= int(checkpoint.name[-6:]) < STEPS
    assert not (second.output / "tuner.safetensors").exists()

    failed = wait_for_state(queue, third.id, "failed")
    assert failed.message == (
        f"The image folder {tmp_path / 'images'} does not exist; give the path of a folder of images."
    )
    queue.resume(second.id)
    # The resumed run has kept its place, but the fourth may have begun: one run at a time.
    last = wait_for_state(queue, fourth.id, "finished")
    finished = wait_for_state(queue, second.id, "finished")
    assert (last.output / "tuner.safetensors").is_file()
    assert_same(finished.output / "tuner.safetensors", uninterrupted)
    assert f"resumed     from {checkpoint}" in finished.log.read_text()
    assert stopped.ended is not None
    assert failed.started is not None
    assert failed.ended is not None
    assert stopped.ended <= failed.started
    times = sorted((run.started, run.ended) for run in queue.runs() if run.started and run.ended)
    assert all(before[1] <= after[0] for before, after in pairwise(times)), "one at a time"


def test_a_run_survives_its_supervisors_and_is_continued_after_a_reboot(
    queue: RunQueue, settings: MakeSettings, uninterrupted: Path
) -> None:
    run = queue.add(settings("out", checkpoint_every=3))
    command = start_script("-m", "restune_diffusion", "queue", "run", "--queue", queue.folder, "--devices", "cpu")
    wait_for(lambda: list_checkpoints(run.output), lambda: run.log.read_text())
    trained = queue.get(run.id)
    assert trained.pid is not None
    # It would be finished before all its supervisors have come and gone.
    os.kill(trained.pid, signal.SIGSTOP)
    command.send_signal(signal.SIGINT)
    shown, errors = command.communicate(timeout=60)
    assert (command.returncode, errors) == (0, "")
    assert shown.splitlines()[1:] == [
        "Run 1 (out): running",
        "Run 1 goes on; `restune queue cancel` stops a run.",
    ]
    assert (queue.get(run.id).state, queue.get(run.id).pid) == ("running", trained.pid)

    second = ensure_supervisor(queue.folder, ["cpu"])
    assert ensure_supervisor(queue.folder) == second == living_supervisor(queue.folder)
    kill_supervisor(queue, second)
    third = ensure_supervisor(queue.folder, ["cpu"])
    assert third != second
    adopted = queue.get(run.id)
    assert (adopted.state, adopted.pid, adopted.started) == ("running", trained.pid, trained.started)

    # A reboot ends all processes at once, and none of them records it.
    kill_supervisor(queue, third)
    os.killpg(os.getpgid(trained.pid), signal.SIGKILL)
    wait_for(lambda: queue.get(run.id).state == "waiting", lambda: queue.get(run.id))
    saved = list_checkpoints(run.output)[-1]
    assert queue.get(run.id).message == f"The run was interrupted; it continues from {saved.name}."
    fourth = ensure_supervisor(queue.folder, ["cpu"])
    finished = wait_for_state(queue, run.id, "finished")
    assert f"resumed     from {saved}" in finished.log.read_text()
    assert finished.log.read_text().count("resumed ") == 1
    assert_same(finished.output / "tuner.safetensors", uninterrupted)
    os.kill(fourth, signal.SIGTERM)
    wait_for(lambda: living_supervisor(queue.folder) is None, lambda: fourth)


def test_two_processes_add_at_once_and_no_run_is_lost(queue: RunQueue, settings: MakeSettings) -> None:
    arguments = [sys.executable, "-c", ADDS, json.dumps(settings("out")), str(queue.folder)]
    both = [subprocess.Popen([*arguments, name]) for name in "ab"]
    assert [process.wait(60) for process in both] == [0, 0]
    runs = queue.runs()
    assert [run.id for run in runs] == [str(number) for number in range(1, 25)]
    for name in "ab":
        own = [run.output.name for run in runs if run.name == name]
        assert own == [f"out-{name}-{number}" for number in range(12)]
