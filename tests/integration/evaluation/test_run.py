"""`restune evaluate --run`: all saved tuners of a run, measured as `restune evaluate` measures each of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from restune_diffusion.cli import main
from restune_diffusion.cli.run_demo import BASE, IMAGES
from restune_diffusion.evaluation import evaluate_tuner
from restune_diffusion.pipelines.load_base import load_base
from restune_diffusion.training import TrainConfig, sweep, train

FILES = ["icon-000002.safetensors", "icon.best.safetensors", "icon.safetensors"]
STEPS, GUIDANCE, DRIFT = 2, 3.0, "red apple, flat style"


def write(folder: Path, rows: list[str]) -> Path:
    folder.mkdir(parents=True)
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    for row in rows:
        shutil.copy(IMAGES / json.loads(row)["file_name"], folder)
    return folder


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return load_base(str(BASE), torch.float32)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, pipeline: Any) -> Path:
    """Folder of a run on four images, with three held out."""
    folder = tmp_path_factory.mktemp("run")
    rows = (IMAGES / "metadata.jsonl").read_text().splitlines()
    config = TrainConfig(
        base=str(BASE), data=write(folder / "data", rows[:7]), output=folder / "out", name="icon", steps=4,
        batch_size=2, learning_rate=3e-3, save_every=2, checkpoint_every=1, checkpoints_kept=2, keep="best",
        log_with="none",
        validation={"holdout": 3, "every": 2, "steps": STEPS, "guidance": GUIDANCE, "metrics": ["lpips", "similarity"],
                    "prompts": ["a fox, ink style"], "drift_prompts": [DRIFT]},
    )  # fmt: skip
    train(config, pipeline=pipeline, verbose=False)
    return folder / "out"


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exited:
        main(["evaluate", "--device=cpu", *map(str, arguments)])
    shown = capsys.readouterr()
    return int(exited.value.code or 0), shown.out, shown.err


def test_each_row_is_what_the_file_alone_measures(
    run: Path, pipeline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, output, errors = evaluate(capsys, "--run", run)
    assert code == 0, errors
    report = json.loads((run / "evaluation" / "report.json").read_text())
    # The checkpoint of step 4 is the finished tuner, and that of step 3 has no other file.
    names = ["icon-000002.safetensors", "checkpoint-000003/tuner.safetensors", *FILES[1:]]
    assert list(report["rows"]) == ["base", *names, "true pictures"]
    assert [report["files"][name]["step"] for name in FILES] == [2, 4, 4]
    sheet = json.loads((run / "data.json").read_text())
    rows = {json.loads(row)["file_name"]: row for row in (IMAGES / "metadata.jsonl").read_text().splitlines()}
    held_out = write(tmp_path / "held-out", [rows[each["name"]] for each in sheet["held_out"]])
    training = write(tmp_path / "training", [rows[each["name"]] for each in sheet["files"]])
    for name in names[1:3]:
        alone = evaluate_tuner(
            pipeline, run / name, held_out, tmp_path / "alone", training_images=training, drift_prompts=[DRIFT],
            steps=STEPS, guidance=GUIDANCE,
        )  # fmt: skip
        assert report["rows"][name] == pytest.approx(alone.rows["tuner"], abs=1e-9)
    assert report["rows"]["base"] == pytest.approx(alone.rows["base"], abs=1e-9)
    assert report["rows"]["true pictures"] == pytest.approx(alone.rows["true pictures"], abs=1e-9)
    # Training measured the same, in other batches.
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for step, name in ((0, "base"), (2, FILES[0]), (4, FILES[2])):
        for metric in ("lpips", "similarity"):
            (value,) = [line[metric] for line in logged if line["step"] == step and metric in line]
            assert value == pytest.approx(report["rows"][name][metric], abs=1e-3)
    markdown = (run / "evaluation" / "report.md").read_text()
    assert "| icon-000002.safetensors " in markdown
    assert "The KID of 3 images is mostly noise; it needs 24 or more." in markdown
    assert "No own subject, top 5: it needs 6 held-out images, and there are 3." in markdown
    # Four columns: three held-out captions and the validation prompt. Six rows, each with its figures.
    width, height = Image.open(run / "evaluation" / "grid.png").size
    assert 4 * 192 < width < 5 * 192 + 200
    assert 6 * (192 + 18) < height < 6 * (192 + 18 + 40) + 80
    assert str(run / "evaluation" / "report.md") in output


def test_other_images_and_prompts_replace_those_of_the_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = (IMAGES / "metadata.jsonl").read_text().splitlines()
    data = write(tmp_path / "data", rows[8:10])
    code, _, errors = evaluate(
        capsys, "--run", run, "--data", data, "--output", tmp_path / "out", "--steps=1", "--guidance=1", "--seed=5",
        "--prompts", "a", "b", "--drift-prompts", "c",
    )  # fmt: skip
    assert code == 0, errors
    settings = json.loads((tmp_path / "out" / "report.json").read_text())["settings"]
    assert settings | {"pictures": 2, "steps": 1, "guidance": 1.0, "seed": 5, "drift_prompts": ["c"]} == settings
    assert settings["training_pictures"] == 4


def test_a_sweep_is_measured_as_one(pipeline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = (IMAGES / "metadata.jsonl").read_text().splitlines()
    config = TrainConfig(
        base=str(BASE), data=write(tmp_path / "data", rows[:2]), output=tmp_path / "out", name="icon", steps=1,
        sweep="lr=1e-4,1e-3", checkpoint_every=0, log_with="none", validation={"prompts": ["a fox"], "steps": 1},
    )  # fmt: skip
    sweep(config, pipeline=pipeline, verbose=False)
    code, _, errors = evaluate(capsys, "--run", tmp_path / "out")
    assert code == 0, errors
    report = json.loads((tmp_path / "out" / "evaluation" / "report.json").read_text())
    names = [f"{folder.name}/{folder.name}.safetensors" for folder in sorted((tmp_path / "out").glob("icon-*"))]
    assert len(names) == 2
    assert list(report["files"]) == names
    # There are no true images, so only the distance to the training images is measured.
    assert {key for key, value in report["rows"][names[-1]].items() if value is not None} == {"nearest_training"}


def test_what_cannot_be_measured_is_one_sentence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "new").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "new")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "report.md").write_text("mine")
    tuner = run / FILES[0]
    cases: list[tuple[list[str | Path], str]] = [
        (["--run", tmp_path / "gone"], "There is no folder"),
        (["--run", tmp_path / "empty"], "has no config.yaml; give the output folder of a training run or a sweep."),
        (["--run", tmp_path / "new"], "has no saved tuner yet; wait for the end of the run"),
        (["--run", run, "--tuner", tuner], "leave --tuner out, or --run"),
        (["--run", run, "--output", tmp_path / "taken"], "exists; choose another output"),
        (["--tuner", tuner], "--base and --data and --output are missing; or give --run."),
    ]
    for arguments, message in cases:
        code, output, errors = evaluate(capsys, *arguments)
        assert (code in (1, 2), output) == (True, "")
        assert message in errors
        assert errors.strip().count("\n") == 0
