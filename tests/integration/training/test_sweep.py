from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from restune_diffusion.cli import main
from restune_diffusion.training import StepReport, TrainConfig, sweep, train
from restune_diffusion.training.output_folder import latest_checkpoint
from restune_diffusion.training.sweeps.grid import parse_sweep
from restune_diffusion.utils.errors import TrainingError, TrainingInterrupted

from ...tiny_training import sd_pipeline
from ...unit.training.test_train import assert_same

MakeConfig = Callable[..., TrainConfig]


def counting_pipeline() -> tuple[Any, list[int]]:
    pipeline, passes = sd_pipeline(), []
    pipeline.unet.register_forward_hook(lambda *_: passes.append(1))
    return pipeline, passes


def assert_equal_to_those_trained_alone(swept: Any, config: TrainConfig, alone: Path, pipeline: Any) -> None:
    assert len(swept.rows) > 1
    for variant, row in zip(parse_sweep(config), swept.rows, strict=True):
        own = variant.config.model_copy(update={"output": alone / row.name})
        result = train(own, pipeline=pipeline, verbose=False)
        assert_same(row.file, result.path)
        lines = (row.file.parent / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["loss"] for line in lines] == list(result.losses)
        assert row.loss == pytest.approx(sum(result.losses) / len(result.losses))
        assert row.steps == own.steps


def test_bypass_tuners_share_forward_passes_and_equal_those_trained_alone(config: MakeConfig, tmp_path: Path) -> None:
    pipeline, passes = counting_pipeline()
    settings = config(
        tuner="bypass",
        sweep="ratio=0.125,0.5 lr=1e-3,1e-2 taps=*,up.*+mid",
        steps=3,
        gradient_accumulation_steps=2,
        ema_decay=0.9,
        caption_dropout=0.3,
    )
    swept = sweep(settings, pipeline=pipeline, verbose=False)
    assert len(swept.rows) == 8
    assert len(passes) == 3 * 2, "one forward pass for the eight tuners"
    assert not pipeline.unet._forward_pre_hooks
    few = config(**{**settings.model_dump(exclude={"sweep"}), "sweep": "ratio=0.5 lr=1e-2,1e-3 taps=up.*+mid"})
    by_name = {row.name: row for row in swept.rows}
    for variant in parse_sweep(few):
        own = variant.config.model_copy(update={"output": tmp_path / "alone" / variant.config.name})
        result = train(own, pipeline=pipeline, verbose=False)
        assert_same(by_name[own.name].file, result.path)


@pytest.mark.parametrize("tuner", ["skip", "res"])
def test_other_tuners_equal_those_trained_alone(config: MakeConfig, tmp_path: Path, tuner: str) -> None:
    pipeline, passes = counting_pipeline()
    axis = "ratio=0.25,1.0" if tuner == "skip" else "width=2,4"
    settings = config(tuner=tuner, sweep=axis, steps=2)
    swept = sweep(settings, pipeline=pipeline, verbose=False)
    assert len(passes) == 2 * 2
    assert_equal_to_those_trained_alone(swept, settings, tmp_path / "alone", pipeline)


def test_tuners_with_other_batches_have_separate_forward_passes(config: MakeConfig, tmp_path: Path) -> None:
    pipeline, passes = counting_pipeline()
    settings = config(tuner="bypass", sweep="seed=0,1 snr_gamma=none,5 steps=2,3")
    swept = sweep(settings, pipeline=pipeline, verbose=False)
    assert len(swept.rows) == 8
    assert len(passes) == 2 * 3
    settings = config(tuner="bypass", sweep="batch_size=1,2", steps=2, output=tmp_path / "sizes")
    swept = sweep(settings, pipeline=pipeline, verbose=False)
    assert_equal_to_those_trained_alone(swept, settings, tmp_path / "alone", pipeline)


def test_tuners_trained_from_a_feature_cache_need_no_forward_pass(config: MakeConfig, tmp_path: Path) -> None:
    pipeline, passes = counting_pipeline()
    settings = config(tuner="bypass", sweep="ratio=0.125,0.5", feature_cache=2, steps=4)
    swept = sweep(settings, pipeline=pipeline, verbose=False)
    assert len(passes) == 6, "the feature cache only"
    assert (settings.output / "feature-cache").is_dir()
    assert_equal_to_those_trained_alone(swept, settings, tmp_path / "alone", pipeline)
    assert len(passes) == 6


@pytest.mark.parametrize(
    "changes",
    [
        {"tuner": "skip", "sweep": "ratio=0.25,1.0"},
        {"tuner": "bypass", "sweep": "ratio=0.125,0.5", "feature_cache": 2},
        {"tuner": "bypass", "sweep": "ratio=0.125,0.5", "preservation": "output"},
    ],
)
def test_the_drift_of_every_tuner_is_logged_with_its_losses(config: MakeConfig, changes: dict[str, Any]) -> None:
    settings = config(class_prompt="a shape", steps=2, **changes)
    swept = sweep(settings, pipeline=sd_pipeline(), verbose=False)
    for row in swept.rows:
        assert row.file is not None
        lines = [json.loads(line) for line in (row.file.parent / "metrics.jsonl").read_text().splitlines()]
        drifts = [line["drift"] for line in lines if "drift" in line]
        assert drifts[0] == 0.0 < drifts[-1]
        losses = [line["loss"] for line in lines if "loss" in line]
        assert len(losses) == 2
        assert row.loss == pytest.approx(sum(losses) / 2)


def test_a_tuner_that_diverges_does_not_stop_the_others(config: MakeConfig, tmp_path: Path) -> None:
    pipeline = sd_pipeline()
    settings = config(tuner="bypass", sweep="lr=1e30,1e-3", steps=4)
    swept = sweep(settings, pipeline=pipeline, verbose=False)
    wild, tame = swept.rows
    assert wild.loss is wild.file is None
    assert wild.error is not None
    assert "is not a finite number; lower the learning rate (now 1e+30)" in wild.error
    assert wild.steps < 4
    alone = train(config(tuner="bypass", steps=4, output=tmp_path / "alone"), pipeline=pipeline, verbose=False)
    assert_same(tame.file, alone.path)
    assert [row["error"] is None for row in json.loads(swept.summary.read_text())] == [False, True]
    assert swept.table().splitlines()[2].startswith("1e30  stopped")
    with pytest.raises(TrainingError, match="All tuners of the sweep stopped; tuner-lr1e30: Stopped at step"):
        sweep(config(sweep="lr=1e30,1e31", output=tmp_path / "all"), pipeline=pipeline, verbose=False)


@pytest.mark.parametrize("tuner", ["bypass", "skip"])
def test_an_interrupted_sweep_is_continued_exactly(config: MakeConfig, tmp_path: Path, tuner: str) -> None:
    pipeline = sd_pipeline()
    settings = {"tuner": tuner, "sweep": "ratio=0.125,0.25,0.5", "steps": 5, "checkpoint_every": 2}
    reports: list[tuple[str, int]] = []

    def die(name: str, report: StepReport) -> None:
        reports.append((name, report.step))
        if (name, report.step) == ("tuner-ratio0.25", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(config(**settings), pipeline=pipeline, verbose=False, on_progress=die)
    folders = [variant.config.output for variant in parse_sweep(config(**settings))]
    saved = [latest_checkpoint(folder) for folder in folders]
    assert [path and path.name for path in saved] == [
        "checkpoint-000002" if tuner == "bypass" else "checkpoint-000005", "checkpoint-000002", None,
    ]  # fmt: skip
    with pytest.raises(TrainingError, match=r"holds checkpoint-00000\d of an earlier run; add --resume"):
        sweep(config(**settings), pipeline=pipeline, verbose=False)
    resumed = sweep(config(**settings, resume=True), pipeline=pipeline, verbose=False)
    whole = sweep(config(**settings, output=tmp_path / "whole"), pipeline=pipeline, verbose=False)
    for one, other in zip(resumed.rows, whole.rows, strict=True):
        assert_same(one.file, other.file)
        assert one.loss == other.loss


def test_a_signal_saves_every_tuner(config: MakeConfig, tmp_path: Path) -> None:
    pipeline = sd_pipeline()
    settings = {"tuner": "bypass", "sweep": "ratio=0.125,0.25", "steps": 5}

    def ask(name: str, report: StepReport) -> None:
        if (name, report.step) == ("tuner-ratio0.125", 3):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingInterrupted, match=r"every started tuner is saved in .*out; run the same command"):
        sweep(config(**settings), pipeline=pipeline, verbose=False, on_progress=ask, stop_on_signal=True)
    saved = [latest_checkpoint(variant.config.output) for variant in parse_sweep(config(**settings))]
    assert [path and path.name for path in saved] == ["checkpoint-000003", "checkpoint-000002"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    resumed = sweep(config(**settings, resume=True), pipeline=pipeline, verbose=False)
    whole = sweep(config(**settings, output=tmp_path / "whole"), pipeline=pipeline, verbose=False)
    for one, other in zip(resumed.rows, whole.rows, strict=True):
        assert_same(one.file, other.file)


def test_the_command_shows_a_table_and_the_samples_side_by_side(
    base: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    flags = ["--base", base, "--data", images, "--output", output, "--name", "ink", "--tuner", "bypass", "--cpu",
             "--steps", 2, "--checkpoint-every", 0, "--sweep", "ratio=0.125,0.5 lr=1e-3,1e-2",
             "--validation.prompts", "a disc", "a red disc", "--validation.steps", 1]  # fmt: skip
    with pytest.raises(SystemExit) as exited:
        main(["train", *map(str, flags)])
    shown = capsys.readouterr().out
    assert exited.value.code == 0, shown
    assert "sweep       4 tuners, 4 of them share the base's forward passes; the first one:" in shown
    assert "Trained 4 tuners in" in shown
    rows = json.loads((output / "sweep.json").read_text())
    assert [row["name"] for row in rows] == [
        "ink-ratio0.125-lr1e-3", "ink-ratio0.125-lr1e-2", "ink-ratio0.5-lr1e-3", "ink-ratio0.5-lr1e-2",
    ]  # fmt: skip
    assert rows[1]["settings"] == {"ratio": "0.125", "lr": "1e-2"}
    assert rows[1]["file"] == "ink-ratio0.125-lr1e-2/ink-ratio0.125-lr1e-2.safetensors"
    best = min(rows, key=lambda row: row["loss"])
    table = shown.split("ratio  lr    loss")[1].splitlines()
    assert table[1].split()[:2] == list(best["settings"].values())
    assert f"{best['loss']:.4f}" in table[1]
    with Image.open(output / "sweep.png") as sheet:
        single = Image.open(output / rows[0]["name"] / "samples" / "step-000002" / "sheet.png")
        assert sheet.width > single.width
        assert sheet.height >= single.height


def test_a_sweep_is_not_taken_for_a_run(config: MakeConfig) -> None:
    with pytest.raises(TrainingError, match="call `sweep` instead of `train`"):
        train(config(sweep="lr=1e-3,1e-4"), verbose=False)


def test_the_text_is_parsed_into_a_grid_of_configs(config: MakeConfig) -> None:
    settings = config(tuner=("skip", "text"), text={"rank": 4}, sweep="ratio=0.1,1 text.rank=2,8 lr=1e-4 alpha=none,2")
    variants = parse_sweep(settings)
    assert len(variants) == 8
    third = variants[2].config
    assert (third.skip.ratio, third.text.rank, third.text.alpha, third.optimizer.learning_rate) == (0.1, 8, None, 1e-4)
    assert variants[1].config.text.alpha == 2
    assert third.name == "tuner-ratio0.1-rank8-lr1e-4-alphanone"
    assert third.output == settings.output / third.name
    assert third.sweep is None
    (only,) = parse_sweep(config(tuner="bypass", sweep='taps="up.*+mid"'))
    assert only.config.bypass.taps == ("up.*", "mid")
    assert only.config.name == "tuner-tapsup.__mid"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ratoi=0.1,0.2", "The sweep has an unknown setting `ratoi`. Did you mean ratio?"),
        ("learning_rates=1", "Did you mean learning_rate?"),
        ("zzzzz=1", "Available settings: lr, "),
        ("resolution=64,128", "so resolution cannot differ among them"),
        ("gradient_accumulation_steps=1,2", "gradient_accumulation_steps cannot differ"),
        ("bypass.ratio=1", "The sweep has an unknown setting `bypass.ratio`. Did you mean skip.ratio?"),
        ("ratio=0.1,0.1", "contains the tuner tuner-ratio0.1 twice"),
        ("ratio=0.1 ratio=0.2", "must name each setting once"),
        ("", "must name each setting once"),
        ("ratio", "names no values in `ratio`"),
        ("ratio=,", "names no values"),
        (
            "ratio=big",
            "The sweep's tuner tuner-ratiobig has invalid settings: skip.ratio: big is not valid; use a number",
        ),
        ("ratio=9", "skip.ratio: 9 is not valid; use a number above 0, up to 8"),
        ("lr_warmup_steps=5", "a constant learning rate has no warm-up"),
        ('ratio="0.1', "cannot be read: No closing quotation"),
    ],
)
def test_an_invalid_text_is_refused(config: MakeConfig, text: str, message: str) -> None:
    with pytest.raises(TrainingError) as refused:
        parse_sweep(config(sweep=text))
    assert message in str(refused.value)


def test_a_setting_of_two_parts_is_ambiguous(config: MakeConfig) -> None:
    with pytest.raises(TrainingError, match=r"`ratio` is ambiguous; write skip\.ratio or control\.ratio"):
        parse_sweep(config(tuner=("skip", "control"), sweep="ratio=0.1,0.2"))
