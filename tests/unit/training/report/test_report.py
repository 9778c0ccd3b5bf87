from __future__ import annotations

import base64
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from restune_diffusion.cli import main
from restune_diffusion.training import TrainConfig, ValidationConfig, train
from restune_diffusion.training.report import write_report
from restune_diffusion.training.report.curves import running_mean
from restune_diffusion.training.report.images import chosen_steps
from restune_diffusion.training.report.run_folder import read_run_folder
from restune_diffusion.utils.errors import RestuneError

from .... import tiny_training as tiny

EVIL = "<script>alert(1)</script> & \"quoted\" <img src=x onerror='y'> {{ 7 * 7 }}"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_images(tmp_path_factory.mktemp("report") / "images").parent


@pytest.fixture(scope="module")
def finished(workplace: Path) -> Path:
    """Folder of a finished run; tests must not change it."""
    config = TrainConfig(
        base="user/base",
        data=workplace / "images",
        output=workplace / "out",
        name="disc",
        steps=12,
        batch_size=2,
        snr_gamma=5,
        cpu=True,
        checkpoint_every=6,
        log_with="none",
        validation=ValidationConfig(prompts=("a disc", EVIL), every=6, steps=1),
    )
    train(config, pipeline=tiny.sd_pipeline(), verbose=False)
    return config.output


@pytest.fixture
def unfinished(tmp_path: Path) -> Callable[..., Path]:
    """Make the folder of a run in progress, without training."""

    def make(lines: list[str], **settings: Any) -> Path:
        folder = tmp_path / "run"
        folder.mkdir()
        values = {"base": "user/base", "data": "/secret/images", "output": str(folder), "steps": 100, **settings}
        (folder / "config.yaml").write_text(json.dumps(values))  # JSON is YAML
        (folder / "metrics.jsonl").write_text("\n".join(lines))
        return folder

    return make


class Page(HTMLParser):
    """Parsed page: tags with attributes, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


def test_the_page_of_a_finished_run_has_everything(finished: Path, tmp_path: Path) -> None:
    page = Page(write_report(finished, tmp_path / "page.html"))
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert f"{losses[0]:.4f} → {losses[-1]:.4f}" in page.text, "a window of one: 12 steps are few"
    assert "12 of 12" in page.text
    assert "Training finished" in page.text
    for title in ("Loss", "Loss by timestep", "Learning rate", "Gradient norm"):
        assert title in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    assert "snr_gamma" in page.text
    assert "6 images, 6 captions." in page.text
    assert "16 × 16" in page.text
    assert "a teal disc" in page.text
    assert f"pipe.load_tuner_weights({str(finished / 'disc.safetensors')!r}, tuner_name='disc')" in page.text
    assert "restune generate --base user/base" in page.text


def test_without_a_data_sheet_the_tuner_file_describes_the_data(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "copy")
    (folder / "data.json").unlink()
    assert "6 images of 16 px" in Page(write_report(folder)).text


def test_grids_show_the_sample_images_step_by_step(finished: Path, tmp_path: Path) -> None:
    images = Page(write_report(finished, tmp_path / "page.html")).images()
    assert [image["alt"] for image in images] == [
        f"{prompt}, step {step}" for prompt in ("a disc", EVIL) for step in (0, 6, 12)
    ]
    for image, (number, step) in zip(images, [(n, s) for n in (0, 1) for s in (0, 6, 12)], strict=True):
        head, _, data = str(image["src"]).partition(",")
        assert head == "data:image/png;base64"
        with Image.open(finished / "samples" / f"step-{step:06d}" / f"{number:02d}.png") as sample:
            assert np.array_equal(Image.open(io.BytesIO(base64.b64decode(data))), sample)


def test_the_page_loads_nothing_and_runs_nothing(finished: Path, tmp_path: Path) -> None:
    path = write_report(finished, tmp_path / "page.html")
    page = Page(path)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "image"})
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                assert str(value).startswith(("data:", "#")), (tag, name, value)
    assert not re.search(r"url\((?!#)", path.read_text())
    assert "default-src 'none'" in path.read_text()


def test_text_of_users_is_escaped(unfinished: Callable[..., Path]) -> None:
    evil_step = json.dumps({"step": 1, "loss": 0.5, EVIL: 3.0, "loss_by_timestep/<b>": 1.0, "loss_by_timestep/0-9": 2})
    folder = unfinished([evil_step], prompt=EVIL, validation={"prompts": [EVIL]})
    (folder / "data.json").write_text(
        json.dumps(
            {
                "images": 1,
                "buckets": [{"width": 64, "height": 32, "images": 1}],
                "captions": [{"text": EVIL, "images": 1}],
                "left_out": [{"name": EVIL, "reason": EVIL, "fault": True}],
            }
        )
    )
    samples = folder / "samples" / "step-000001"
    samples.mkdir(parents=True)
    Image.new("RGB", (400, 200), "red").save(samples / "00.png")
    page = Page(write_report(folder))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "b"})
    assert [image["alt"] for image in page.images()] == [f"{EVIL}, step 1"]
    assert page.text.count(EVIL) >= 4, "caption, name, reason and prompt as they were written"
    shown = Image.open(io.BytesIO(base64.b64decode(str(page.images()[0]["src"]).partition(",")[2])))
    assert shown.size == (320, 160)


def test_a_run_in_progress_has_a_page(unfinished: Callable[..., Path], finished: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 1 / step, "seconds": 2.0}) for step in range(1, 41)]
    folder = unfinished([*lines, '{"step": 41, "lo'])
    samples = folder / "samples" / "step-000000"
    samples.mkdir(parents=True)
    (samples / "00.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
    text = Page(write_report(folder)).text
    assert "Not finished: step 40 of 100" in text
    assert "about 2 min 0 s" in text, "60 steps of 2 s"
    assert "Time in steps" in text
    assert "1 min 20 s" in text
    assert "not readable" in text
    assert "The run has not written a tuner or a checkpoint yet" in text
    assert "/secret" not in text
    (folder / "checkpoint-000040").mkdir()
    (folder / "checkpoint-000040" / "tuner.safetensors").write_bytes((finished / "disc.safetensors").read_bytes())
    text = Page(write_report(folder)).text
    assert "The tuner after step 40" in text
    assert str(folder / "checkpoint-000040" / "tuner.safetensors") in text


def test_a_run_that_has_just_begun_has_a_page(unfinished: Callable[..., Path]) -> None:
    folder = unfinished([])
    (folder / "metrics.jsonl").unlink()
    text = Page(write_report(folder)).text
    assert "step 0 of 100" in text
    assert "No step has finished yet" in text


def test_metrics_of_other_tools_are_shown_too(unfinished: Callable[..., Path]) -> None:
    lines = ['{"step": 0, "drift": 0.0}', '{"step": 1, "loss": 1.0}', '{"step": 1, "drift": 1.5}', "[]"]
    lines += ['{"step": "x"}', '{"step": 2, "loss": NaN, "other_figure": 3, "note": "x"}']
    run = read_run_folder(unfinished(lines))
    assert run.series == {"drift": [(0, 0.0), (1, 1.5)], "loss": [(1, 1.0)], "other_figure": [(2, 3.0)]}
    text = Page(write_report(run.path)).text
    assert "Drift" in text
    assert "Other figure" in text


def test_metrics_of_the_saved_tuner_have_a_curve_and_a_meaning(unfinished: Callable[..., Path]) -> None:
    lines = [{"step": step, "lpips": 0.4 - step / 100, "image_drift": step / 10} for step in (0, 5, 10)]
    page = write_report(unfinished([json.dumps(line) for line in lines])).read_text(encoding="utf-8")
    assert 'aria-label="LPIPS by step"' in page
    assert "Of the saved tuner: perceptual distance to the true image of the same caption, lower is closer." in page
    assert 'aria-label="image drift by step"' in page
    assert "Of the saved tuner: LPIPS between the base&#39;s and the tuner&#39;s images" in page


def test_the_drift_of_old_logs_is_shown(unfinished: Callable[..., Path]) -> None:
    """A run that version 0.1 began and that was resumed later has lines with both names."""
    lines = ['{"step": 0, "leak": 0.0}', '{"step": 1, "loss": 1.0}', '{"step": 2, "leak": 1.5}']
    run = read_run_folder(unfinished([*lines, '{"step": 4, "drift": 2.5}']))
    assert run.series == {"drift": [(0, 0.0), (2, 1.5), (4, 2.5)], "loss": [(1, 1.0)]}
    page = write_report(run.path)
    text = Page(page).text
    assert "Drift" in text
    assert "Leak" not in text
    assert page.read_text(encoding="utf-8").count("drift by step") == 1


def test_what_is_no_run_is_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, message in [(tmp_path, "has no config.yaml"), (tmp_path / "gone", "There is no folder")]:
        with pytest.raises(SystemExit) as exited:
            main(["report", str(folder)])
        errors = capsys.readouterr().err
        assert exited.value.code == 1
        assert message in errors
        assert errors.count("\n") == 1
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RestuneError, match=r"pip install 'restune-diffusion\[report\]'"):
        write_report(tmp_path)


def test_the_command_writes_the_page(
    unfinished: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = unfinished(['{"step": 1, "loss": 1.0}'])
    with pytest.raises(SystemExit) as exited:
        main(["report", str(folder), "--output", str(tmp_path / "a" / "page.html")])
    assert exited.value.code == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "a" / "page.html")
    assert "<h1>tuner</h1>" in (tmp_path / "a" / "page.html").read_text()


def test_running_means_are_over_at_most_the_window() -> None:
    assert running_mean(np.array([2.0, 4, 6, 9]), 2).tolist() == [2, 3, 5, 7.5]
    assert running_mean(np.array([2.0, 4, 6]), 9).tolist() == [2, 3, 4]


def test_first_and_last_of_many_steps_are_shown() -> None:
    assert chosen_steps(list(range(0, 1001, 100)), 6) == [0, 200, 400, 600, 800, 1000]
    assert chosen_steps([0, 5], 6) == [0, 5]


def test_a_run_that_stopped_early_is_finished_and_tells_why(workplace: Path, tmp_path: Path) -> None:
    # At this rate the weights do not change in fp32, and neither does the loss.
    config = TrainConfig(
        base="user/base", data=workplace / "images", output=tmp_path / "out", name="ink", steps=9, batch_size=4,
        cpu=True, checkpoint_every=0, learning_rate=1e-12, log_with="none", keep="best", patience=2,
        validation={"holdout": 4, "loss_every": 1},
    )  # fmt: skip
    train(config, pipeline=tiny.sd_pipeline(), verbose=False)
    run = read_run_folder(config.output)
    assert (run.finished, run.step, run.steps) == (True, 2, 9)
    assert run.best is not None
    assert run.best[:3] == (tmp_path / "out" / "ink.best.safetensors", "validation_loss", 0)
    page = Page(write_report(config.output))
    assert "Training finished" in page.text
    assert "validation_loss was best at step 0" in page.text
    assert "4 held out of training: " in page.text
    assert "Held-out images (orange) have the same noise" in page.text
    assert page.text.count("held-out images") >= 1, "in the legend of the plot"
