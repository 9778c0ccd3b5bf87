"""The scripts of `examples/`, with few steps: they write the images that plain calls of the pipeline generate."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from restune_diffusion import ResConfig, SkipConfig, Tuner, read_info, save_tuner

from ...conftest import ROOT, randomize

EXAMPLES = ROOT / "examples"
ROUNDING = 2
"""Largest difference of a pixel, of 255, between an image in a batch and the image alone."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Function that runs a script of the folder with arguments and returns what it prints."""

    def start(name: str, *arguments: Any) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.syspath_prepend(EXAMPLES)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        printed = capsys.readouterr()
        assert ended.value.code == 0, printed.err
        return printed.out

    return start


@pytest.fixture(scope="module")
def tuners(components: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two strong random tuners, one of them with a trigger word."""
    folder = tmp_path_factory.mktemp("styles")
    for seed, (name, config) in enumerate({"wild": SkipConfig(ratio=0.25), "odd": ResConfig(width=8)}.items()):
        tuner = Tuner.for_base(components["unet"], config)
        randomize(tuner, seed, std=0.4 if name == "odd" else 0.15)
        training = {"trigger_words": ["odd style"]} if name == "odd" else None
        save_tuner(tuner, folder / f"{name}.safetensors", training=training)
    return folder


def pixels(image: Image.Image | Path) -> np.ndarray:
    return np.asarray(Image.open(image) if isinstance(image, Path) else image).astype(int)


def alone(pipe: Any, prompt: str, seed: int = 0, steps: int = 2) -> np.ndarray:
    """Return the image that a call for one prompt generates with the weights that are set."""
    generator = torch.Generator().manual_seed(seed)
    return pixels(pipe(prompt, num_inference_steps=steps, guidance_scale=4.0, generator=generator).images[0])


def cells(grid: Path, columns: int) -> list[np.ndarray]:
    """Return the images of the last row of a grid with cells of 256 px, at their own size of 64 px."""
    image = Image.open(grid).convert("RGB")
    left, top = image.width - columns * 264, image.height - 264
    boxes = [(left + 264 * column, top, left + 264 * column + 256, top + 256) for column in range(columns)]
    return [pixels(image.crop(box))[::4, ::4] for box in boxes]


def test_a_tuner_is_trained_and_shown_beside_the_base(run, pipe, tmp_path):
    printed = run(
        "train_and_generate.py", "--steps=3", "--inference-steps=2", "--prompt", "red heart", "--output", tmp_path
    )
    assert f"{tmp_path / 'grid.png'}: the same prompts" in printed
    base, tuned = cells(tmp_path / "grid.png", 2)
    assert (base == alone(pipe, "red heart")).all()
    pipe.load_tuner_weights(tmp_path / "tuner.safetensors")
    assert (tuned == alone(pipe, "red heart")).all()
    assert np.abs(tuned - base).max() > 20
    recorded = read_info(tmp_path / "tuner.safetensors").training["config"]
    assert (recorded["steps"], recorded["learning_rate"], recorded["res"]["width"]) == (3, 2e-3, 64)


def test_another_base_and_folder_are_trained_with_the_settings_of_the_preset(run, base, images, tmp_path):
    run(
        "train_and_generate.py", "--base", base, "--data", images, "--output", tmp_path, "--steps=1",
        "--inference-steps=1", "--prompt", "a red disc", "a blue disc",
    )  # fmt: skip
    info = read_info(tmp_path / "tuner.safetensors")
    assert (info.training["config"]["learning_rate"], info.training["images"]) == (5e-4, 6)
    assert info.base.name == base.name
    assert (tmp_path / "grid.png").exists()


def test_rows_of_one_batch_are_the_images_of_single_calls(run, pipe, tuners, tmp_path):
    files = [tuners / "wild.safetensors", tuners / "odd.safetensors"]
    printed = run(
        "many_styles_in_one_batch.py", "--tuners", *files, "--prompt", "red heart", "--inference-steps=2",
        "--output", tmp_path,
    )  # fmt: skip
    assert "6 styles in one batch" in printed
    for file in files:
        pipe.load_tuner_weights(file)
    mixes = {
        "base": {"wild": 0.0, "odd": 0.0},
        "wild": {"wild": 1.0, "odd": 0.0},
        "odd": {"wild": 0.0, "odd": 1.0},
        "wild at 0.5": {"wild": 0.5, "odd": 0.0},
        "odd at 0.5": {"wild": 0.0, "odd": 0.5},
        "mixed": {"wild": 0.5, "odd": 0.5},
    }
    seen: list[np.ndarray] = []
    for name, weights in mixes.items():
        row = pixels(tmp_path / f"{name}.png")
        pipe.set_tuners(weights)
        assert np.abs(row - alone(pipe, "red heart")).max() <= ROUNDING, name
        assert all(np.abs(row - other).max() > 10 * ROUNDING for other in seen), name
        seen.append(row)


def test_requests_of_the_engine_give_the_images_of_single_calls(run, pipe, tuners, tmp_path):
    printed = run(
        "serve_many_styles.py", "--tuners", tuners, "--prompt", "red heart", "tulip", "--inference-steps=2",
        "--output", tmp_path,
    )  # fmt: skip
    images, calls = map(int, re.search(r"(\d+) images in (\d+) calls", printed).groups())
    # Three images of 2 steps and three of 4, which 18 calls would compute one by one.
    assert images == 6
    assert 4 <= calls < 18
    for number, prompt in enumerate(["red heart", "tulip"]):
        base = alone(pipe, prompt, number, 2 + 2 * number)
        assert np.abs(pixels(tmp_path / f"{number}-base.png") - base).max() <= ROUNDING
        for name, text in {"wild": prompt, "odd": f"{prompt}, odd style"}.items():
            pipe.load_tuner_weights(tuners / f"{name}.safetensors")
            expected = alone(pipe, text, number, 2 + 2 * number)
            pipe.unload_tuner_weights()
            assert np.abs(pixels(tmp_path / f"{number}-{name}.png") - expected).max() <= ROUNDING, (prompt, name)
            assert np.abs(expected - base).max() > 10 * ROUNDING


def test_the_tuners_of_the_examples_are_trained_once(run, tmp_path):
    arguments = ("many_styles_in_one_batch.py", "--steps=1", "--inference-steps=1", "--output", tmp_path)
    run(*arguments)
    written = {style: (tmp_path / f"{style}.safetensors").stat().st_mtime_ns for style in ("ink", "chalk")}
    assert [read_info(tmp_path / f"{style}.safetensors").trigger_words for style in written] == [
        ["ink style"],
        ["chalk style"],
    ]
    # The background of each.
    chalk, ink = (pixels(tmp_path / f"{style}-icons" / "fox.png") for style in ("chalk", "ink"))
    assert (chalk[0, 0] == (20, 60, 160)).all()
    assert (ink[0, 0] == 255).all()
    run(*arguments)
    assert {style: (tmp_path / f"{style}.safetensors").stat().st_mtime_ns for style in written} == written


def test_an_error_is_one_sentence(run, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["x", "--tuners", str(tmp_path / "none"), "--output", str(tmp_path)])
    monkeypatch.syspath_prepend(EXAMPLES)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / "serve_many_styles.py"), run_name="__main__")
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("restune: The tuner library ")
