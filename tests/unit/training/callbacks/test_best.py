"""Validation loss during training, the best tuner, and early stops."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from restune_diffusion.storage.tuner_file import load_tuner, read_info
from restune_diffusion.training import StepReport, TrainConfig, train
from restune_diffusion.training.callbacks import validation_loss as module
from restune_diffusion.training.callbacks.validation_loss import loss_interval
from restune_diffusion.training.config.validation import ValidationConfig
from restune_diffusion.utils.errors import TrainingError

from ....tiny_training import sd_pipeline

MakeConfig = Callable[..., TrainConfig]
SETTINGS: dict[str, Any] = {
    "batch_size": 2, "name": "disc", "learning_rate": 1e-2, "log_with": "none",
    "validation": {"holdout": 2, "loss_every": 2},
}  # fmt: skip


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Function that replaces the loss of a step by a given one."""

    def give(**values: float) -> None:
        monkeypatch.setattr(module, "held_out_loss", lambda run, held_out, encoder: values[f"s{run.step}"])

    return give


def logged(output: Path, name: str = "validation_loss") -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def weights(path: Path) -> list[float]:
    values: list[float] = torch.cat([value.flatten() for value in load_tuner(path).state_dict().values()]).tolist()
    return values


def facts(path: Path) -> dict[str, Any]:
    training = read_info(path).training
    assert training is not None
    return dict(training)


def crash_at(step: int) -> Callable[[StepReport], None]:
    def crash(report: StepReport) -> None:
        if report.step == step:
            raise KeyboardInterrupt

    return crash


def test_runs_of_different_seeds_start_with_the_same_loss(config: MakeConfig, tmp_path: Path) -> None:
    curves = []
    for seed in (0, 5):
        output = tmp_path / str(seed)
        train(config(output=output, seed=seed, steps=3, **SETTINGS), verbose=False)
        curves.append(logged(output))
    assert [*curves[0]] == [0, 2, 3], "at the start, every two steps, and at the end"
    assert curves[0][0] == curves[1][0]
    assert curves[0][2] != curves[1][2]
    assert len({*curves[0].values()}) == 3


def test_the_loss_is_that_of_the_objective_with_the_averaged_weights(config: MakeConfig, tmp_path: Path) -> None:
    train(config(steps=2, ema_decay=0.5, **SETTINGS), verbose=False)
    plain = {**SETTINGS, "init_tuner": tmp_path / "out" / "disc.safetensors"}
    train(config(output=tmp_path / "again", steps=1, **plain), verbose=False)
    assert logged(tmp_path / "out")[2] == logged(tmp_path / "again")[0], "the file has the averaged weights"
    train(config(output=tmp_path / "weighted", steps=1, snr_gamma=1, **plain), verbose=False)
    assert logged(tmp_path / "weighted")[0] < 0.9 * logged(tmp_path / "again")[0]


@pytest.mark.parametrize(
    ("settings", "interval"),
    [({}, 5), ({"every": 7}, 7), ({"every": 7, "loss_every": 3, "holdout": 1}, 3)],
)
def test_the_interval_is_that_of_the_samples_unless_given(settings: dict[str, Any], interval: int) -> None:
    assert loss_interval(ValidationConfig(**settings), 99) == interval


def test_the_best_file_is_the_tuner_of_its_step(
    config: MakeConfig, tmp_path: Path, losses: Callable[..., None]
) -> None:
    losses(s0=3, s2=1.5, s4=2, s5=1.75)
    result = train(config(steps=5, keep="best", save_every=2, **SETTINGS), verbose=False)
    best = tmp_path / "out" / "disc.best.safetensors"
    assert result.best == best
    assert weights(best) == weights(tmp_path / "out" / "disc-000002.safetensors")
    assert facts(best)["best"] == {"measurement": "validation_loss", "step": 2, "value": 1.5}
    assert (facts(best)["steps"], facts(result.path)["steps"], result.stopped_early) == (2, 5, None)
    for path in [result.path, *(tmp_path / "out").glob("disc-*")]:
        path.unlink()
    with pytest.raises(TrainingError, match=r"holds disc\.best\.safetensors of an earlier run"):
        train(config(steps=5, keep="best", **SETTINGS), verbose=False)


def test_the_last_step_can_be_the_best(config: MakeConfig, tmp_path: Path, losses: Callable[..., None]) -> None:
    losses(s0=3, s2=2, s3=1)
    result = train(config(steps=3, keep="best", **SETTINGS), verbose=False)
    assert weights(tmp_path / "out" / "disc.best.safetensors") == weights(result.path)


def test_patience_ends_the_run_as_a_finished_one(
    config: MakeConfig, tmp_path: Path, losses: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    losses(s0=3, s2=1.5, s4=2, s6=1.75, s8=1)
    validation = {**SETTINGS["validation"], "prompts": ("a disc",), "steps": 1, "every": 2, "drift_prompts": ("a",)}
    settings = {**SETTINGS, "validation": validation, "checkpoint_every": 4}
    result = train(config(steps=20, patience=2, save_every=3, **settings), verbose=True)
    assert result.steps == 6
    reason = "validation_loss was best at step 2 (1.5), and 2 measurements since then were not better"
    assert result.stopped_early == facts(result.path)["stopped_early"] == reason
    assert facts(result.path)["steps"] == 6
    assert [path.name for path in sorted((tmp_path / "out").glob("checkpoint-*"))] == [
        "checkpoint-000004", "checkpoint-000006",
    ]  # fmt: skip
    assert [path.name for path in result.samples] == [f"step-{step:06d}" for step in (0, 2, 4, 6)]
    assert [*logged(tmp_path / "out", "drift")] == [0, 2, 4, 6]
    lines = (tmp_path / "out" / "metrics.jsonl").read_text()
    assert lines.count('"drift"') == lines.count('"validation_loss"') == 4
    shown = capsys.readouterr()
    assert "loss 1.5000 at step 2 (the best so far)" in shown.out + shown.err
    assert "loss 2.0000 at step 4 (best 1.5000 at 2)" in shown.out + shown.err

    # It has ended: another resume changes nothing, unless the patience is larger.
    again = config(steps=20, patience=2, resume=True, **settings)
    assert train(again, verbose=False).steps == 6
    losses(s0=3, s2=1.5, s4=2, s6=1.75, s8=1, s10=2, s12=2, s14=2)
    longer = train(again.model_copy(update={"patience": 3}), verbose=False)
    assert (longer.steps, facts(longer.path)["steps"]) == (14, 14)
    assert "best at step 8" in str(longer.stopped_early)


@pytest.mark.parametrize("crash", [5, 7])
def test_a_resumed_run_keeps_the_same_best_and_stops_at_the_same_step(
    config: MakeConfig, tmp_path: Path, losses: Callable[..., None], crash: int
) -> None:
    losses(s0=4, s2=3, s4=1, s6=2, s8=1.5, s10=1)
    settings = {**SETTINGS, "steps": 30, "patience": 2, "keep": "best", "checkpoint_every": 3, "ema_decay": 0.5}
    whole = train(config(output=tmp_path / "whole", **settings), verbose=False)
    assert whole.steps == 8
    halves = config(output=tmp_path / "halves", **settings)
    with pytest.raises(KeyboardInterrupt):
        train(halves, verbose=False, on_progress=crash_at(crash))
    # Whatever the crash left there may belong to a step that the resumed run has not reached.
    (tmp_path / "halves" / "disc.best.safetensors").write_bytes(b"of a later step")
    resumed = train(halves.model_copy(update={"resume": True}), verbose=False)
    assert (resumed.steps, resumed.stopped_early) == (whole.steps, whole.stopped_early)
    assert logged(tmp_path / "halves") == logged(tmp_path / "whole")
    for name in ("disc.safetensors", "disc.best.safetensors"):
        assert weights(tmp_path / "halves" / name) == weights(tmp_path / "whole" / name)
        assert facts(tmp_path / "halves" / name) == facts(tmp_path / "whole" / name)
    assert facts(tmp_path / "halves" / "disc.best.safetensors")["best"]["step"] == 4


def test_the_plan_names_the_held_out_images(config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(steps=1, **SETTINGS), pipeline=sd_pipeline())
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("held out"))
    assert line.startswith("held out    2 images: ")
    assert line.endswith("; loss every 2 steps, 16 forward passes each")
    assert "warning     the loss of 2 held-out images says little" in shown
