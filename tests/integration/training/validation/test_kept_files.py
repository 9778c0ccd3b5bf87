"""The tuner of a step and the best one work in every command, as the last one does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from restune_diffusion import RestuneStableDiffusionPipeline, load_tuner, read_info
from restune_diffusion.cli import main
from restune_diffusion.cli.run_demo import BASE, IMAGES
from restune_diffusion.training import TrainConfig, train

Run = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with four images, and a run that has kept the tuners of two steps and the best one."""
    folder = tmp_path_factory.mktemp("kept")
    rows = (IMAGES / "metadata.jsonl").read_text().splitlines()[:4]
    (folder / "icons").mkdir()
    (folder / "icons" / "metadata.jsonl").write_text("\n".join(rows))
    for row in rows:
        shutil.copy(IMAGES / json.loads(row)["file_name"], folder / "icons")
    config = TrainConfig(
        base=str(BASE), data=folder / "icons", output=folder / "out", name="ink", tuner="lora", steps=3,
        learning_rate=5e-3, save_every=1, checkpoint_every=0, cpu=True, log_with="none", keep="best",
        validation={"holdout": 1, "loss_every": 1},
    )  # fmt: skip
    train(config, verbose=False)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Function that runs a command without an error and returns what it printed."""

    def run(*arguments: Any) -> str:
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        assert not exited.value.code, shown.err
        return shown.out

    return run


STEP, BEST = "out/ink-000002.safetensors", "out/ink.best.safetensors"
SAMPLING = ("--base", BASE, "--steps=1", "--device=cpu", "--prompt", "a fox")


def test_generate(folder: Path, tmp_path: Path, run: Run) -> None:
    tuners = (f"{folder / STEP}:0.5", folder / BEST)
    run("generate", *SAMPLING, "--tuner", *tuners, "--tuner-guidance", "ink.best:cond", "--output", tmp_path)
    (image,) = tmp_path.glob("*.png")
    shown = run("inspect", image)
    assert "ink-000002" in shown
    assert "ink.best" in shown


def test_grid(folder: Path, tmp_path: Path, run: Run) -> None:
    run("grid", *SAMPLING, "--tuner", folder / STEP, folder / BEST, "--mix", "--json", "--output", tmp_path / "a.png")
    columns = json.loads((tmp_path / "a.json").read_text())["columns"]
    assert [column["label"] for column in columns] == ["base", "ink-000002", "ink.best", "mix"]


def test_evaluate(folder: Path, tmp_path: Path, run: Run) -> None:
    run("evaluate", *SAMPLING[:4], "--tuner", folder / BEST, "--data", folder / "icons", "--limit=2", "--output",
        tmp_path)  # fmt: skip
    assert "tuner" in json.loads((tmp_path / "report.json").read_text())["rows"]


def test_inspect(folder: Path, run: Run) -> None:
    assert json.loads(run("inspect", folder / STEP, "--json"))["training"]["steps"] == 2
    best = json.loads(run("inspect", folder / BEST, "--json"))["training"]
    assert best["best"]["measurement"] == "validation_loss"
    assert best["best"]["step"] == best["steps"]
    assert "ink.best" in run("inspect", folder / BEST)


@pytest.mark.parametrize("file", [STEP, BEST])
def test_convert(folder: Path, tmp_path: Path, run: Run, file: str) -> None:
    run("convert", folder / file, tmp_path / "theirs.safetensors", "--to", "kohya")
    run("convert", tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors", "--to", "restune", "--base", BASE)
    # The factors come back divided differently; a merge with weight -1 leaves nothing.
    rest_file = tmp_path / "rest.safetensors"
    run("merge", folder / file, f"{tmp_path / 'ours.safetensors'}:-1", "--method=add", "--output", rest_file)
    parts: Any = load_tuner(rest_file).parts()
    rest = [layer.delta().abs().max() for part in parts for layer in part.loras().values()]
    assert rest
    assert max(map(float, rest)) < 1e-6


def test_merge(folder: Path, tmp_path: Path, run: Run) -> None:
    run("merge", f"{folder / STEP}:0.5", f"{folder / BEST}:0.5", "--output", tmp_path / "both.safetensors")
    assert read_info(tmp_path / "both.safetensors").metadata["modelspec.merged_from"] == (
        "ink-000002.safetensors, ink.best.safetensors"
    )


def test_init_tuner(folder: Path, tmp_path: Path, run: Run) -> None:
    run("train", "--base", BASE, "--data", folder / "icons", "--output", tmp_path, "--tuner=lora", "--steps=1",
        "--learning-rate=1e-12", "--init-tuner", folder / STEP, "--cpu", "--log-with=none")  # fmt: skip
    first, second = (load_tuner(path).state_dict() for path in (folder / STEP, tmp_path / "tuner.safetensors"))
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=0, atol=1e-9)


def test_report(folder: Path, tmp_path: Path, run: Run) -> None:
    run("report", folder / "out", "--output", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "ink.best.safetensors: validation_loss" in page
    assert "held out of training" in page


def test_load_tuner_weights(folder: Path) -> None:
    pipeline = RestuneStableDiffusionPipeline.from_pretrained(BASE)
    pipeline.load_tuner_weights(folder / STEP)
    pipeline.load_tuner_weights(folder / BEST, tuner_name="best")
    assert pipeline.get_list_tuners() == {"ink-000002": 1.0, "best": 1.0}
    pipeline.load_tuner_weights(folder / BEST)
    assert "ink.best" in pipeline.get_list_tuners()
