"""Effect of signals on a training run in a separate process."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from restune_diffusion.storage.tuner_file import load_tuner
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.training.output_folder import list_checkpoints
from restune_diffusion.training.stopping import StopRequest
from restune_diffusion.utils.errors import TrainingInterrupted

from ...unit.training.test_train import assert_same

MakeConfig = Callable[..., TrainConfig]
Script = Callable[..., "subprocess.Popen[str]"]
ROOT = Path(__file__).parents[3]
STYLE = ROOT / "train" / "train_style.py"
FOREVER = 100_000

# A training that hangs in its second step.
HANGS = """
import sys, time
from restune_diffusion.cli.guard import run_guarded
from restune_diffusion.training import TrainConfig, train
def hang(report):
    if report.step == 2:
        print("hangs", flush=True)
        time.sleep(600)
config = TrainConfig.model_validate_json(sys.argv[1])
sys.exit(run_guarded(lambda: train(config, on_progress=hang, verbose=False, stop_on_signal=True)))
"""


def flags(config: TrainConfig, **more: Any) -> list[str | Path]:
    settings = {"learning_rate": config.optimizer.learning_rate, "checkpoint_every": config.checkpoints.every, **more}
    return ["--base", config.base, "--data", config.data.folder, "--output", config.output, "--cpu",
            *(f"--{name.replace('_', '-')}={value}" for name, value in settings.items())]  # fmt: skip


def wait_for_steps(config: TrainConfig, process: subprocess.Popen[str], steps: int) -> None:
    log = config.output / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if log.is_file() and log.read_text().count("\n") >= steps:
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate()[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_saves_a_checkpoint(
    config: MakeConfig, tmp_path: Path, script: Script, number: signal.Signals
) -> None:
    settings = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 5, "ema_decay": 0.9, "noise_offset": 0.1}
    stopped = config(output=tmp_path / "stopped", **settings)
    process = script(STYLE, *flags(stopped, steps=FOREVER, batch_size=2, **settings))
    wait_for_steps(stopped, process, 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    # A scheduler's signal is no failure, and Ctrl-C ends every command with 130.
    assert process.returncode == (130 if number == signal.SIGINT else 0), errors
    (checkpoint,) = list_checkpoints(stopped.output)
    step = int(checkpoint.name[-6:])
    last = errors.strip().splitlines()[-1]
    assert last.startswith(f"restune: Stopped after step {step} of {FOREVER}, as requested; {checkpoint} is saved")
    assert "--resume" in last
    assert (stopped.output / "metrics.jsonl").read_text().count("\n") == step
    assert not stopped.file.exists()
    assert "Traceback" not in errors

    resumed = train(stopped.model_copy(update={"steps": step + 2, "resume": True}), verbose=False)
    whole = train(config(output=tmp_path / "whole", steps=step + 2, **settings), verbose=False)
    assert resumed.losses == whole.losses[-2:]
    assert_same(resumed.path, whole.path)


def test_a_second_ctrl_c_exits_at_once(config: MakeConfig, script: Script) -> None:
    settings = config()
    process = script("-c", HANGS, settings.model_dump_json())
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "hangs\n"
    process.send_signal(signal.SIGINT)
    while "press Ctrl-C again" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None, "neither the first Ctrl-C nor SIGTERM ends the step"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert not list_checkpoints(settings.output)


def launch(script: Script, arguments: list[str | Path]) -> subprocess.Popen[str]:
    return script(
        "-m", "accelerate.commands.launch", "--multi_gpu", "--gpu_ids=all", "--num_processes=2",
        "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", STYLE, *arguments,
    )  # fmt: skip


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if any(str(STYLE) in word for word in child.cmdline())]


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(
    config: MakeConfig, tmp_path: Path, script: Script
) -> None:
    stopped = config(output=tmp_path / "stopped")
    process = launch(script, flags(stopped, steps=FOREVER, batch_size=1))
    wait_for_steps(stopped, process, 2)
    both = workers(process)
    assert len(both) == 2
    both[-1].send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    (checkpoint,) = list_checkpoints(stopped.output)
    assert errors.count("restune: Stopped after step") == 1, "one of the processes tells it for both"
    steps = int(checkpoint.name[-6:]) + 2

    resume = launch(script, [*flags(stopped, steps=steps, batch_size=1), "--resume"])
    assert resume.wait(120) == 0, resume.communicate()[1]
    whole = config(output=tmp_path / "whole")
    assert launch(script, flags(whole, steps=steps, batch_size=1)).wait(120) == 0
    assert_same(stopped.file, whole.file)


def test_library_calls_leave_signals_alone_unless_asked(config: MakeConfig) -> None:
    handlers = []
    train(config(steps=1), verbose=False, on_progress=lambda _: handlers.append(signal.getsignal(signal.SIGTERM)))
    assert handlers == [signal.SIG_DFL]


def test_handlers_are_given_back(config: MakeConfig) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    settings = config(steps=5)

    def ask(report: Any) -> None:
        if report.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingInterrupted, match="after step 3 of 5"):
        train(settings, verbose=False, on_progress=ask, stop_on_signal=True)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert [path.name for path in list_checkpoints(settings.output)] == ["checkpoint-000003"]


def test_a_signal_in_the_last_step_changes_nothing(config: MakeConfig) -> None:
    settings = config(steps=2)
    ask = {2: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    result = train(
        settings, verbose=False, on_progress=lambda report: ask.get(report.step, int)(), stop_on_signal=True
    )
    assert load_tuner(result.path).num_parameters() > 0


def test_ignored_signals_stay_ignored_and_other_threads_do_not_listen() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest().listening():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)

    seen = []

    def listen() -> None:
        with StopRequest().listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
