from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from PIL import Image

from restune_diffusion import RestuneStableDiffusionPipeline, SkipConfig, Tuner, save_tuner
from restune_diffusion.cli import main
from restune_diffusion.cli.run_demo import BASE, IMAGES

from ...conftest import randomize


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with four evaluation and two training images of the demo, a zero-initialized and a random tuner."""
    folder = tmp_path_factory.mktemp("evaluation")
    rows = (IMAGES / "metadata.jsonl").read_text().splitlines()
    for name, chosen in (("data", rows[:4]), ("training", rows[4:6])):
        (folder / name).mkdir()
        (folder / name / "metadata.jsonl").write_text("\n".join(chosen))
        for row in chosen:
            shutil.copy(IMAGES / json.loads(row)["file_name"], folder / name)
    tuner = Tuner.for_base(RestuneStableDiffusionPipeline.from_pretrained(BASE).unet, SkipConfig(ratio=0.25))
    save_tuner(tuner, folder / "fresh.safetensors")
    randomize(tuner, std=0.05)
    save_tuner(tuner, folder / "acting.safetensors")
    return folder


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exited:
        main(["evaluate", "--base", str(BASE), "--steps=2", "--device=cpu", *map(str, arguments)])
    shown = capsys.readouterr()
    return int(exited.value.code or 0), shown.out, shown.err


def test_a_fresh_tuner_measures_as_the_base_does(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, output, errors = evaluate(
        capsys, "--tuner", workplace / "fresh.safetensors", "--data", workplace / "data", "--output", tmp_path / "new",
        "--training-images", workplace / "training", "--drift-prompts", "red apple, flat style", "--batch-size=3",
    )  # fmt: skip
    assert code == 0, errors
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    rows = report["rows"]
    assert list(rows) == ["base", "tuner", "true pictures"]
    assert rows["tuner"].pop("drift") == 0
    assert rows["base"].pop("drift") is None
    assert rows["tuner"] == rows["base"]
    # top 5 is not measured for fewer than six images
    assert rows["base"].pop("retrieval_top5") is None
    assert all(math.isfinite(value) for value in rows["base"].values())
    assert rows["base"]["lpips"] > 0.1
    assert report["settings"]["pictures"] == 4
    assert report["settings"]["training_pictures"] == 2
    assert str(tmp_path / "new" / "report.md") in output
    table = output.split(str(tmp_path))[0].strip()
    assert table in (tmp_path / "new" / "report.md").read_text()
    assert table.count("\n") == 4
    assert "| true images |" in table
    # three columns of images to the right of the captions, four rows below the heading
    width, height = Image.open(tmp_path / "new" / "grid.png").size
    assert width > 3 * 192
    assert height > 4 * 192
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["grid.png", "report.json", "report.md"]


def test_a_random_tuner_differs_from_the_base_and_shared_images_are_logged(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    code, output, errors = evaluate(
        capsys, "--tuner", f"{workplace / 'acting.safetensors'}:1.5", "--data", workplace / "data", "--limit=2",
        "--training-images", workplace / "data", "--output", tmp_path,
    )  # fmt: skip
    assert code == 0, errors
    assert "2 of the images are also training images" in caplog.text
    report = json.loads((tmp_path / "report.json").read_text())
    rows = report["rows"]
    assert report["settings"]["weight"] == 1.5
    assert report["settings"]["pictures"] == 2
    assert rows["tuner"]["lpips"] != rows["base"]["lpips"]
    assert rows["true pictures"]["nearest_training"] == pytest.approx(0, abs=1e-9)
    assert rows["tuner"]["nearest_training"] > 0.01
    # drift is not measured without drift prompts
    assert rows["tuner"]["drift"] is None
    assert "drift" not in output


def test_invalid_inputs_give_a_one_line_error(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one").mkdir()
    shutil.copy(IMAGES / "fox.png", tmp_path / "one")
    (tmp_path / "one" / "fox.txt").write_text("fox")
    (tmp_path / "foreign.safetensors").write_bytes(b"PK")
    fresh = workplace / "fresh.safetensors"
    cases = [
        (fresh, tmp_path / "one", f"needs at least two images, but {tmp_path / 'one'} has 1."),
        (fresh, tmp_path / "gone", "does not exist"),
        (tmp_path / "foreign.safetensors", workplace / "data", "is a pickle"),
        (tmp_path / "gone.safetensors", workplace / "data", "There is no tuner at"),
    ]
    for tuner, data, message in cases:
        code, output, errors = evaluate(capsys, "--tuner", tuner, "--data", data, "--output", tmp_path / "out")
        assert (code, output) == (1, "")
        assert message in errors
        assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()
