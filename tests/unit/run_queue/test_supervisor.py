"""Supervisor, with small scripts in the place of training processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from socket import gethostname
from typing import Any

import psutil
import pytest

from restune_diffusion.run_queue import RunQueue, Supervisor, ensure_supervisor, launching, living_supervisor
from restune_diffusion.run_queue.records import PROCESS_FILE, RECORD_FILE, Record, now, read_record, write_record
from restune_diffusion.utils.errors import RestuneError, UsageError

from .conftest import UNTIL_INTERRUPTED, Scripts, wait_for, wait_for_state

MakeSettings = Callable[..., dict[str, Any]]
Supervise = Callable[..., Supervisor]


def test_waiting_runs_start_in_order_and_one_at_a_time(
    queue: RunQueue, settings: MakeSettings, scripts: Scripts
) -> None:
    names = ["a", "b", "c", "d"]
    for name in names:
        queue.add(settings(name))
        scripts[name] = "finish()"
    queue.move("4", 0)
    queue.cancel("2")
    shown: list[tuple[str, str]] = []
    Supervisor(queue, on_change=lambda run: shown.append((run.name, run.state))).run(until_empty=True)
    assert [name for name, state in shown if state == "finished"] == ["d", "a", "c"]
    runs = {run.name: run for run in queue.runs()}
    assert [runs[name].state for name in names] == ["finished", "cancelled", "finished", "finished"]
    for before, after in (("d", "a"), ("a", "c")):
        assert runs[before].ended <= runs[after].started  # type: ignore[operator]


def test_each_device_trains_one_run(
    queue: RunQueue, settings: MakeSettings, scripts: Scripts, supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    for name in "abc":
        queue.add(settings(name))
        scripts[name] = "(output / 'gpu').write_text(os.environ['CUDA_VISIBLE_DEVICES'])" + UNTIL_INTERRUPTED
    supervise("cuda:0", "cuda:1")
    wait_for(lambda: all((queue.get(number).output / "gpu").exists() for number in "12"))
    time.sleep(0.6)
    assert [run.state for run in queue.runs()] == ["running", "running", "waiting"]
    assert [(queue.get(number).output / "gpu").read_text() for number in "12"] == ["4", "6"]
    queue.cancel("2")
    wait_for(lambda: (queue.get("3").output / "gpu").exists())
    assert (queue.get("3").output / "gpu").read_text() == "6"
    assert queue.get("3").device == "cuda:1"


def test_a_device_is_a_flag_or_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launching.environment_of("cuda:2")["CUDA_VISIBLE_DEVICES"] == "2"
    assert "CUDA_VISIBLE_DEVICES" not in launching.environment_of("auto")
    record = Record(name="x", output=Path("o"), result=Path("o/t"), added=now(), device="cpu", resume=True)
    assert launching.command_of(record, Path("/q/runs/1")) == [
        sys.executable, "-m", "restune_diffusion", "train", "--config", "/q/runs/1/config.yaml", "--resume", "--cpu",
    ]  # fmt: skip
    for devices in ((), ("gpu",), ("cuda",)):
        with pytest.raises(UsageError):
            launching.check_devices(devices)


def test_a_running_run_is_interrupted_once_and_its_process_saves(
    queue: RunQueue, settings: MakeSettings, scripts: Scripts, supervise: Supervise
) -> None:
    run = queue.add(settings("a"))
    scripts["a"] = UNTIL_INTERRUPTED
    supervise()
    wait_for(lambda: list(run.output.glob("started-*")))
    with pytest.raises(UsageError, match="Run 1 is running; cancel it first"):
        queue.remove("1")
    queue.cancel("1")
    queue.cancel("1")
    assert queue.get("1").stopping
    stopped = wait_for_state(queue, "1", "stopped")
    assert (run.output / "interruptions").read_text() == "1"
    assert not stopped.stopping
    with pytest.raises(UsageError, match="Run 1 is stopped and cannot be cancelled"):
        queue.cancel("1")
    scripts["a"] = "finish()"
    queue.resume("1")
    assert wait_for_state(queue, "1", "finished").message is None
    with pytest.raises(UsageError, match="Run 1 is finished; only a stopped, failed or cancelled run can be resumed"):
        queue.resume("1")


def test_a_hanging_run_is_killed_at_once_if_asked(
    queue: RunQueue, settings: MakeSettings, scripts: Scripts, supervise: Supervise
) -> None:
    run = queue.add(settings("a"))
    scripts["a"] = "time.sleep(600)"
    supervise()
    wait_for(lambda: list(run.output.glob("started-*")))
    queue.cancel("1", now=True)
    wait_for_state(queue, "1", "stopped")


def test_a_process_killed_by_others_is_started_again_until_it_has_made_no_progress_three_times(
    queue: RunQueue, settings: MakeSettings, scripts: Scripts
) -> None:
    run = queue.add(settings("a"))
    scripts["a"] = "os.kill(os.getpid(), signal.SIGKILL)"
    shown: list[tuple[str, str | None]] = []
    Supervisor(queue, on_change=lambda run: shown.append((run.state, run.message))).run(until_empty=True)
    again = ("running", "The run was interrupted; it continues from the beginning.")
    assert shown[:-1] == [("running", None), again, again]
    assert queue.get("1").state == "failed"
    assert "ended 3 times without a new checkpoint" in str(queue.get("1").message)
    assert len(list(run.output.glob("started-*"))) == 3


def test_the_wrapper_may_be_killed_and_the_run_goes_on(
    queue: RunQueue, settings: MakeSettings, scripts: Scripts, supervise: Supervise, tmp_path: Path
) -> None:
    run = queue.add(settings("a"))
    scripts["a"] = "while not (output / 'go').exists():\n    time.sleep(0.01)\nfinish()"
    supervise()
    wait_for(lambda: list(run.output.glob("started-*")))
    wait_for(lambda: queue.get("1").pid is not None)
    os.kill(os.getpgid(queue.get("1").pid), signal.SIGKILL)  # type: ignore[arg-type]
    time.sleep(0.6)
    assert queue.get("1").state == "running"
    (run.output / "go").touch()
    assert wait_for_state(queue, "1", "finished").pid is None


def test_a_process_with_the_number_of_an_ended_run_is_left_alone(queue: RunQueue, settings: MakeSettings) -> None:
    run = queue.add(settings("a"))
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        folder = run.config.parent
        record = read_record(folder / RECORD_FILE, Record)
        running = {"state": "running", "attempt": 1, "started": now()}
        write_record(folder / RECORD_FILE, record.model_copy(update=running))
        (folder / PROCESS_FILE).write_text(
            json.dumps({"attempt": 1, "host": gethostname(), "group": other.pid, "pid": other.pid})
        )
        found = queue.get("1")
        assert (found.state, found.pid) == ("waiting", None)
        queue.cancel("1", now=True)
        assert queue.get("1").state == "stopped"
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_run_on_another_machine_is_left_to_its_supervisor(
    queue: RunQueue, settings: MakeSettings, scripts: Scripts, supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = queue.add(settings("a"))
    scripts["a"] = UNTIL_INTERRUPTED
    supervise()
    wait_for(lambda: queue.get("1").pid is not None and list(run.output.glob("started-*")))
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(launching, "gethostname", lambda: "elsewhere")
        queue.cancel("1", now=True)
        time.sleep(0.6)
        assert queue.get("1").stopping
    wait_for_state(queue, "1", "stopped")
    assert (run.output / "interruptions").read_text() == "1"


def test_one_supervisor_works_on_a_queue(queue: RunQueue, supervise: Supervise) -> None:
    assert living_supervisor(queue.folder) is None
    first = supervise()
    wait_for(lambda: living_supervisor(queue.folder) == os.getpid())
    with pytest.raises(RestuneError, match=f"Process {os.getpid()} already works on the queue {queue.folder}"):
        Supervisor(queue).run()
    assert ensure_supervisor(queue.folder) == os.getpid()
    first.stop()
    wait_for(lambda: living_supervisor(queue.folder) is None)


def test_an_idle_supervisor_ends_and_one_with_work_does_not(
    queue: RunQueue, settings: MakeSettings, scripts: Scripts
) -> None:
    queue.add(settings("a"))
    scripts["a"] = "time.sleep(1.2); finish()"
    started = time.monotonic()
    thread = threading.Thread(target=Supervisor(queue).run, kwargs={"idle_seconds": 0.5})
    thread.start()
    thread.join(60)
    assert queue.get("1").state == "finished"
    assert time.monotonic() - started >= 1.7


def test_a_background_supervisor_leaves_the_session_and_names_why_it_cannot_start(queue: RunQueue) -> None:
    process = ensure_supervisor(queue.folder)
    try:
        assert os.getsid(process) == process != os.getsid(0)
        assert "restune_diffusion.run_queue.background" in psutil.Process(process).cmdline()
    finally:
        os.kill(process, signal.SIGTERM)
    wait_for(lambda: living_supervisor(queue.folder) is None)
    (queue.folder / "queue.json").write_text("{")
    with pytest.raises(RestuneError, match=r"did not start: .*queue\.json is damaged; delete it to order the runs"):
        ensure_supervisor(queue.folder)
    (queue.folder / "queue.json").unlink()


def test_a_run_that_cannot_be_started_fails_and_the_next_one_starts(
    queue: RunQueue, settings: MakeSettings, scripts: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        queue.add(settings(name))
        scripts[name] = "finish()"
    command = launching.command_of
    monkeypatch.setattr(
        launching,
        "command_of",
        lambda record, folder: ["/nowhere"] if record.output.name == "a" else command(record, folder),
    )
    Supervisor(queue).run(until_empty=True)
    assert [run.state for run in queue.runs()] == ["failed", "finished"]
    assert queue.get("1").message == "/nowhere cannot be started: No such file or directory."
