"""Children stop while others compute, with real processes."""

import subprocess
import sys
import time

import psutil
import pytest

from research.restune_tiny.parts.yielding import Yielding, others_in_interval
from tests.conftest import ROOT

SPIN = "while True: pass"


def spinning(nice):
    return subprocess.Popen([sys.executable, "-c", f"import os; os.nice({nice}); print(1, flush=True)\n{SPIN}"],
                            stdout=subprocess.PIPE)  # fmt: skip


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def child():
    process = spinning(19)
    assert process.stdout.readline() == b"1\n"
    yield psutil.Process(process.pid)
    process.kill()
    process.wait()


def test_a_child_is_stopped_while_others_compute_and_goes_on_when_they_have_been_calm(child):
    used, measured = [0.0], []

    def measure():
        time.sleep(0.02)
        measured.append(used[0])
        return used[0]

    with Yielding(measure):
        used[0] = 0.5
        wait_for(lambda: child.status() == psutil.STATUS_STOPPED)
        used[0] = 0.1
        wait_for(lambda: child.status() != psutil.STATUS_STOPPED)
        assert measured.index(0.1) + 3 <= len(measured)
        used[0] = 2.0
        wait_for(lambda: child.status() == psutil.STATUS_STOPPED)
    assert child.status() != psutil.STATUS_STOPPED


def test_a_stopped_worker_ends_with_its_parent():
    program = "import os, signal, time; from research.restune_tiny.parts.yielding import die_with_parent\n"
    program += "if child := os.fork(): time.sleep(2); print(child, flush=True); os._exit(0)\n"
    program += "die_with_parent(); os.kill(os.getpid(), signal.SIGSTOP)"
    printed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    wait_for(lambda: not psutil.pid_exists(int(printed)) or psutil.Process(int(printed)).status() == "zombie")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not count niced time apart")
def test_the_time_of_others_is_told_from_that_of_niced_processes(child):
    before = psutil.cpu_times().nice
    wait_for(lambda: psutil.cpu_times().nice > before)
    with spinning(0) as other:
        other.stdout.readline()
        assert others_in_interval() > 0.3
        other.kill()
