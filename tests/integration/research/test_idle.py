"""The stage `idle` as a process: it survives its death, pauses, and yields the processor."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from research.restune_tiny.parts.examples import held_out_icons
from research.restune_tiny.pretrain_base import main
from research.restune_tiny.stages.idle import PID_FILE
from tests.conftest import ROOT

SCRIPT = ROOT / "research" / "restune_tiny" / "pretrain_base.py"


@pytest.fixture(autouse=True)
def threads():
    """The command takes all cores; the other tests have one thread."""
    yield
    torch.set_num_threads(1)


def wait_until(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def running(pids):
    return [pid for pid in pids if psutil.pid_exists(pid)]


class Idle:
    """A process of the stage."""

    def __init__(self, icons, work):
        self.work = work
        self.command = [sys.executable, str(SCRIPT), "idle", str(icons), str(work)]
        options = [
            "--batch",
            "4",
            "--micro",
            "1",
            "--checkpoint-minutes",
            "0",
            "--print-every",
            "1",
            "--priority",
            "normal",
        ]
        self.process = subprocess.Popen([*self.command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    @property
    def step(self):
        state = self.work / "idle-checkpoint" / "state.json"
        return json.loads(state.read_text())["step"] if state.exists() else 0

    def wait_for(self, condition):
        def met():
            assert self.process.poll() is None, self.process.stderr.read().decode()
            return condition()

        wait_until(met)

    def children(self):
        """Process ids of the living workers."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):  # it ends, or has ended
                found += [child.pid] * ("spawn_main" in str(child.cmdline()))
        return found

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


@pytest.mark.timeout(300)
def test_the_stage_survives_its_death_pauses_and_ends(icons, tmp_path):
    work = tmp_path / "work"
    with Idle(icons, work) as first:
        first.wait_for(lambda: first.step >= 1)
        workers = first.children()
        assert len(workers) == 1
        with pytest.raises(SystemExit, match=f"Process {first.process.pid} trains in"):
            main(first.command[2:])
    reached = first.step
    wait_until(lambda: not running(workers))
    with Idle(icons, work) as second:
        # It pauses at once also while it starts, which takes minutes when it compiles.
        second.wait_for(second.children)
        main([*second.command[2:], "--pause"])
        second.wait_for(lambda: not second.children())
        assert second.step == reached
        main([*second.command[2:], "--resume"])
        second.wait_for(lambda: second.step > reached)
        main([*second.command[2:], "--pause"])
        second.wait_for(lambda: not second.children())
        paused = second.step
        time.sleep(1)
        assert second.step == paused
        main([*second.command[2:], "--resume"])
        second.wait_for(lambda: second.step > paused)
        second.process.send_signal(signal.SIGTERM)
        assert second.process.wait(60) == 0, second.process.stderr.read().decode()
        last = second.step
    log = [json.loads(line) for line in (work / "idle-held-out.jsonl").read_text().splitlines()]
    steps = [entry["step"] for entry in log]
    assert steps[0] == 0
    assert steps[-1] == last
    assert all(entry["noisy_latents"] == 4 * entry["step"] for entry in log)
    assert len({entry["error"] for entry in log}) > 1
    state = load_file(work / "idle-checkpoint" / "state.safetensors")
    assert not torch.equal(state["master"], state["ema"])
    assert (work / "export" / "unet").is_dir()
    (work / PID_FILE).write_text(str(os.getpid()))
    with pytest.raises(SystemExit, match=f"No process trains in {work}"):
        main([*second.command[2:], "--pause"])


def test_it_yields_the_processor_to_all_others():
    code = "import os; from research.restune_tiny.stages.idle import yield_processor; yield_processor(); "
    code += "print(os.sched_getscheduler(0) == os.SCHED_IDLE, os.nice(0))"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["True", "19"]


def test_the_held_out_icons_are_always_the_same():
    chosen = held_out_icons(100, 0.05)
    assert len(chosen) == len(set(chosen.tolist())) == 5
    assert torch.equal(chosen, held_out_icons(100, 0.05))
    assert len(held_out_icons(100, 0.0)) == 0
