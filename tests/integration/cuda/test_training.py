"""Training on the stand-in: one wait a step, and the guarantees of training although losses are read a step late."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.optim.optimizer import register_optimizer_step_post_hook

from restune_diffusion.storage.tuner_file import load_tuner
from restune_diffusion.training import StepReport, TrainConfig, loop, sweep, train
from restune_diffusion.training.build import build_accelerator
from restune_diffusion.training.checkpoint import list_checkpoints
from restune_diffusion.utils.errors import TrainingError

from ...unit.training.test_train import assert_same

MakeConfig = Callable[..., TrainConfig]
READ = "wait: event in training/transfers/to_host.py:Reading.result"
PRODIGY = {"optimizer": "prodigy", "learning_rate": 1.0}


@pytest.fixture(autouse=True)
def _no_device_from_another_test() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def large_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss scaling that starts so high that the first steps overflow."""
    start = torch.amp.GradScaler.__init__

    def begin(self: Any, device: str = "cuda", **settings: Any) -> None:
        start(self, device, **{**settings, "init_scale": 2.0**36, "backoff_factor": 2.0**-12})

    monkeypatch.setattr(torch.amp.GradScaler, "__init__", begin)


def lines(settings: TrainConfig) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = (settings.output / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixed_precision": "fp16"},
        {"mixed_precision": "bf16", "gradient_accumulation_steps": 2, "ema_decay": 0.9, **PRODIGY},
        {"class_prompt": "a disc", "preservation": "output", "validation": {"steps": 1}},
        {"tuner": "bypass", "feature_cache": 2},
    ],
    ids=["skip", "fp16", "prodigy", "preservation", "feature cache"],
)
def test_a_step_waits_once_after_the_launch_of_its_update(config: MakeConfig, cuda: Any, changes: Any) -> None:
    hook = register_optimizer_step_post_hook(lambda *_: cuda.note("to device, no wait", "update"))

    def name(report: StepReport) -> None:
        cuda.current = f"after {report.step}"

    try:
        train(config(cpu=False, steps=4, log_with="none", **changes), verbose=False, on_progress=name)
    finally:
        hook.remove()
    seen = [event for event in cuda.of("after 1", ours=False) if event.waits or event.op == "update"]
    assert [str(event) for event in seen if event.waits] == [READ]
    assert [event.op for event in seen] == ["update", "event"]


def test_losses_are_read_a_step_late_unless_the_state_is_used(config: MakeConfig, cuda: Any) -> None:
    """Drift and samples after step 2, a tuner file after step 3; metrics.jsonl is that of the CPU."""
    courses = []
    for cpu in (True, False):
        settings = config(
            cpu=cpu, output=config().output / str(cpu), steps=4, save_every=3, ema_decay=0.9, log_with="none",
            validation={"prompts": ["a disc"], "steps": 1, "every": 2, "drift_prompts": ["a cat"]},
        )  # fmt: skip
        train(settings, verbose=False)
        courses.append((settings, lines(settings)))
    (here, first), (there, second) = courses
    assert [line.keys() for line in first] == [line.keys() for line in second]
    for one, other in zip(first, second, strict=True):
        compared = [name for name in one if "second" not in name and "memory" not in name]
        assert [other[name] for name in compared] == pytest.approx([one[name] for name in compared], rel=1e-3)
    for name in ("tuner.safetensors", "tuner-000003.safetensors"):
        states = [load_tuner(settings.output / name).state_dict() for settings in (here, there)]
        for key, value in states[0].items():
            torch.testing.assert_close(states[1][key], value, rtol=1e-2, atol=3e-5)


@pytest.mark.parametrize("every", [1, 3])
def test_a_loss_that_is_not_finite_stops_training_and_no_file_has_it(
    config: MakeConfig, cuda: Any, every: int
) -> None:
    found = []
    for cpu in (True, False):
        settings = config(
            cpu=cpu, output=config().output / str(cpu), learning_rate=1e30, steps=20, checkpoint_every=every,
            save_every=every, checkpoints_kept=9,
        )  # fmt: skip
        with pytest.raises(TrainingError, match=r"Stopped at step \d+: the loss is not a finite number") as caught:
            train(settings, verbose=False)
        number = int(re.findall(r"step (\d+)", str(caught.value))[0])
        files = [*settings.output.glob("tuner-*.safetensors"), *settings.output.glob("checkpoint-*/tuner.safetensors")]
        for file in files:
            assert all(value.isfinite().all() for value in load_tuner(file).state_dict().values()), file
        assert not settings.file.exists()
        assert [line["step"] for line in lines(settings)] == list(range(1, number))
        found.append((number, [path.name for path in list_checkpoints(settings.output)], len(files)))
    assert found[0] == found[1]
    assert found[0][0] > 1


def test_a_gradient_that_is_not_finite_stops_training(
    config: MakeConfig, cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = torch.nn.utils.clip_grad_norm_
    norms: list[int] = []

    def infinite(*arguments: Any, **settings: Any) -> torch.Tensor:
        norms.append(1)
        return clip(*arguments, **settings) * (torch.inf if len(norms) == 3 else 1)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", infinite)
    settings = config(cpu=False, steps=20, checkpoint_every=2)
    with pytest.raises(TrainingError, match="Stopped at step 3: the gradient is not a finite number"):
        train(settings, verbose=False)
    assert [path.name for path in list_checkpoints(settings.output)] == ["checkpoint-000002"]
    assert [line["step"] for line in lines(settings)] == [1, 2]


def test_the_last_complete_step_is_logged_before_an_error(
    config: MakeConfig, cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    loss = loop.batch_loss

    def fail_at_third(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return loss(*arguments)

    monkeypatch.setattr(loop, "batch_loss", fail_at_third)
    settings = config(cpu=False, steps=20)
    with pytest.raises(MemoryError):
        train(settings, verbose=False)
    assert [line["step"] for line in lines(settings)] == [1, 2]


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy"])
def test_overflows_are_skipped_and_a_resumed_run_equals_the_uninterrupted(
    config: MakeConfig, cuda: Any, large_scale: None, optimizer: str
) -> None:
    """The schedule counts updates, and a number that is not finite is null in metrics.jsonl."""
    changes = PRODIGY if optimizer == "prodigy" else {}
    settings = config(
        cpu=False, mixed_precision="fp16", steps=6, checkpoint_every=2, checkpoints_kept=9, ema_decay=0.9,
        lr_scheduler="cosine", **changes,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler.*")
        whole = train(settings, verbose=False)
    before = lines(settings)
    norms = [line["grad_norm"] for line in before]
    overflows = norms.index(next(norm for norm in norms if norm is not None))
    assert 1 <= overflows <= 3
    assert None not in norms[overflows:]
    state = json.loads((settings.output / "checkpoint-000006" / "state.json").read_text())
    assert state["lr_scheduler"]["last_epoch"] == 6 - overflows
    rates = [line["learning_rate"] for line in before]
    assert rates[0] == rates[overflows]
    kept = whole.path.rename(whole.path.with_name("whole.safetensors"))
    for late in ("checkpoint-000004", "checkpoint-000006"):
        shutil.rmtree(settings.output / late)
    resumed = train(settings.model_copy(update={"resume": True}), verbose=False)
    assert resumed.losses == whole.losses[2:]
    assert_same(resumed.path, kept)
    timeless = [{name: value for name, value in line.items() if "second" not in name} for line in before]
    again = [{name: value for name, value in line.items() if "second" not in name} for line in lines(settings)]
    assert again == timeless


def test_a_checkpoint_moves_between_the_cpu_and_a_gpu(config: MakeConfig, cuda: Any) -> None:
    """AdamW is fused on a GPU alone; the checkpoint continues with the implementation of its new device."""
    losses = []
    for first, second in ((True, True), (True, False), (False, True)):
        common = {"output": config().output / f"{first}{second}", "checkpoint_every": 2}
        train(config(cpu=first, steps=2, **common), verbose=False)
        losses.append(train(config(cpu=second, steps=4, resume=True, **common), verbose=False).losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_each_run_has_its_own_peak_memory(config: MakeConfig, cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    used = {"peak": 0}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: used["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: used.update(peak=0))

    def grow(name: str, report: StepReport) -> None:
        used["peak"] = max(used["peak"], (5 if name.endswith("1e-3") else 3) * 2**20)

    settings = config(cpu=False, steps=2, sweep="lr=1e-3,2e-3")
    result = sweep(settings, verbose=False, on_progress=grow)
    peaks = {
        row.name: [json.loads(line)["peak_memory_mib"] for line in (row.file.parent / "metrics.jsonl").open()]
        for row in result.rows
        if row.file is not None
    }
    assert list(peaks.values()) == [[0, 5], [0, 3]]


def test_the_cpu_is_used_after_a_gpu_and_the_other_way_round(config: MakeConfig, cuda: Any) -> None:
    devices = [build_accelerator(config(cpu=cpu)).device.type for cpu in (False, True, False)]
    assert devices == ["cuda", "cpu", "cuda"]


def test_drift_waits_once_for_each_prompt(config: MakeConfig, cuda: Any) -> None:
    settings = config(cpu=False, steps=2, validation={"steps": 1, "drift_prompts": ["a cat", "a dog"]})
    train(settings, verbose=False)
    reads = [event for event in cuda.of() if event.place == "training/callbacks/drift.py:DriftProbe.measure"]
    # Before the first step and after the last.
    assert len(reads) == 2 * 2
