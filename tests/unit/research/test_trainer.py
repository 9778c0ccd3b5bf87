import argparse
import contextlib
import json
import multiprocessing
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from research.restune_tiny.parts.flat import Flat
from research.restune_tiny.parts.folders import replace_folder
from research.restune_tiny.parts.trainer import Trainer, learning_rate


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(7, 2, bias=False), nn.LayerNorm(9))


def test_flat_holds_every_parameter(module):
    flat = Flat(module)
    views = flat.views(flat.gather(module))
    assert list(views) == [name for name, _ in module.named_parameters()]
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(views[name], parameter.detach(), rtol=0, atol=0)
    assert all(offset % 32 == 0 for offset in flat.offsets)


def test_bound_parameters_live_in_the_flat_tensors(module):
    flat = Flat(module)
    start, gradients = flat.gather(module), torch.zeros(flat.size)
    values = start.clone()
    flat.bind(module, values, gradients)
    sum(2 * parameter.sum() for parameter in module.parameters()).backward()
    count = sum(parameter.numel() for parameter in module.parameters())
    assert gradients.sum() == 2 * count
    values -= gradients
    for name, before in flat.views(start).items():
        torch.testing.assert_close(module.get_parameter(name).detach(), before - 2)


def test_learning_rate_warms_up_and_falls_to_a_fiftieth():
    assert learning_rate(0, 100, 5.0, 10) == pytest.approx(0.5)
    assert learning_rate(4, 100, 5.0, 10) == pytest.approx(2.5)
    assert learning_rate(10, 100, 5.0, 10) == pytest.approx(5.0)
    assert learning_rate(55, 100, 5.0, 10) == pytest.approx(5 * 0.51)
    assert learning_rate(100, 100, 5.0, 10) == pytest.approx(0.1)
    assert learning_rate(150, 100, 5.0, 10) == pytest.approx(0.1)


@pytest.mark.parametrize("left_over", [False, True])
def test_replaced_folder_holds_the_new_files_only(tmp_path, left_over):
    folder, new = tmp_path / "model", tmp_path / "model.tmp"
    for path, name in ((folder, "old.txt"), (new, "new.txt")):
        path.mkdir()
        (path / name).write_text(name)
    if left_over:
        (tmp_path / "model.old").mkdir()
        (tmp_path / "model.old" / "older.txt").write_text("older")
    replace_folder(new, folder)
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "model",
        "model/new.txt",
    ]


def test_folder_may_be_new(tmp_path):
    (tmp_path / "model.tmp").mkdir()
    replace_folder(tmp_path / "model.tmp", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


class OwnThread(threading.Thread):
    """Stand-in for a worker process that starts immediately and ends when the barrier breaks."""

    def __init__(self, target, args, daemon):
        super().__init__(target=target, args=args, daemon=daemon)
        self.gate = args[2].gate

    def run(self):
        with contextlib.suppress(threading.BrokenBarrierError):
            super().run()

    def kill(self):
        self.gate.abort()


class Slopes:
    """Job whose micro-batch (step, index) has the gradient 10 * step + index + 1 everywhere."""

    dtype = torch.bfloat16

    def build(self):
        module = nn.Linear(4, 4, bias=False)
        nn.init.ones_(module.weight)
        return module

    def prepare(self, module):
        def run(step, index):
            ((10 * step + index + 1) * module.weight.sum()).backward()
            return {"index": index, "before": step}

        return run


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    context = multiprocessing.get_context("spawn")
    stand_in = SimpleNamespace(Process=OwnThread, Value=context.Value, Barrier=context.Barrier)
    monkeypatch.setattr("torch.multiprocessing.get_context", lambda _: stand_in)
    settings = {"work": tmp_path, "stage": "unet", "workers": 2, "micro": 3, "batch": 4, "steps": 5, "print_every": 2}
    settings |= {"lr": 0.01, "warmup": 2, "ema": 0.9, "clip": 1.0, "optimizer": "adam"}
    trainer = Trainer(Slopes(), argparse.Namespace(**settings), ("index", "before"))
    yield trainer
    trainer.close()


def test_a_worker_that_ends_ends_the_trainer(trainer, monkeypatch):
    trainer.step()
    monkeypatch.setattr(trainer.workers[1], "is_alive", lambda: False)
    end = time.monotonic() + 30
    while not trainer.shared.gate.broken and time.monotonic() < end:
        time.sleep(0.05)
    with pytest.raises(SystemExit, match="A worker process has ended; run the command again"):
        trainer.step()


def test_step_averages_over_micro_batches_and_clips(trainer):
    numbers = trainer.step()
    assert numbers["index"] == pytest.approx(1)
    assert numbers["norm"] == pytest.approx(2 * 4)  # the mean of 1, 2 and 3 in each of sixteen places
    assert numbers["lr"] == pytest.approx(0.01)
    views = trainer.flat.views(trainer.first_moment)
    assert float(views["weight"].norm()) == pytest.approx(0.1)  # clipped to 1; Adam takes a tenth of it
    master, ema = (trainer.flat.views(flat)["weight"].detach() for flat in (trainer.master, trainer.ema))
    torch.testing.assert_close(master, torch.full((4, 4), 0.99))
    torch.testing.assert_close(ema, torch.full((4, 4), 1 - 0.01 * 9 / 11))
    torch.testing.assert_close(trainer.shared.values.float(), trainer.master.detach(), rtol=4e-3, atol=0)
    assert trainer.step()["norm"] == pytest.approx(12 * 4)


def test_run_logs_saves_and_exports_on_the_way(trainer, tmp_path, capsys):
    exported = []
    trainer.run(lambda weights: exported.append((trainer.steps, weights["weight"].clone())), export_every=3)
    assert [step for step, _ in exported] == [3, 5]
    assert torch.equal(exported[-1][1], trainer.averaged()["weight"])
    entries = [json.loads(line) for line in (tmp_path / "unet-log.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["index"], entry["images_per_step"]) for entry in entries] == [(2, 1, 12), (4, 1, 12)]
    assert all(entry["images_per_second"] == pytest.approx(entry["step"] * 12 / entry["seconds"]) for entry in entries)
    assert [line.split()[1:3] for line in capsys.readouterr().out.splitlines()] == [["step", "2"], ["step", "4"]]
    assert json.loads((tmp_path / "unet-checkpoint" / "state.json").read_text()) == {"step": 5}
    assert not any(worker.is_alive() for worker in trainer.workers)
