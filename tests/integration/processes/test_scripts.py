"""The four training scripts, as processes, on the bundled base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.icon_style import character
from restune_diffusion import read_info

from ...conftest import TINY_BASE


def test_a_subject_is_trained(script: Callable[..., Any], tmp_path: Path) -> None:
    data, output = tmp_path / "zorp", tmp_path / "out"
    character.write_training(data)
    process = script(
        "train/train_dreambooth.py", "--pretrained_model_name_or_path", TINY_BASE, "--instance_data_dir", data,
        "--instance_prompt", "zorp creature", "--class_prompt", "creature", "--with_prior_preservation",
        "--num_class_images=2", "--output_dir", output, "--max_train_steps=2", "--validation.steps=2", "--cpu",
    )  # fmt: skip
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "preserved   2 class images" in printed
    assert "drift       " in printed
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 2]
    assert lines[0]["drift"] == 0.0 < lines[-1]["drift"]
    recorded = read_info(output / "tuner.safetensors").training["config"]
    assert (recorded["preservation"], recorded["class_prompt"]) == ("prior", "creature")


def test_a_captioned_set_is_trained(script: Callable[..., Any], images: Path, tmp_path: Path) -> None:
    process = script(
        "train/train_text_to_image.py", "--pretrained_model_name_or_path", TINY_BASE, "--train_data_dir", images,
        "--output_dir", tmp_path / "out", "--max_train_steps=1", "--train_batch_size=2", "--cpu",
    )  # fmt: skip
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "images      6 at 64 x 64, 6 captions" in printed
    assert read_info(tmp_path / "out" / "tuner.safetensors").training["images_seen"] == 2


def test_a_style_is_trained_from_a_preset(script: Callable[..., Any], images: Path, tmp_path: Path) -> None:
    process = script(
        "train/train_style.py", "--preset", "style", "--base", TINY_BASE, "--data", images,
        "--output", tmp_path / "out", "--steps=2", "--validation.prompts", "red apple, noto style",
        "--validation.steps=2", "--cpu",
    )  # fmt: skip
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    sheet = tmp_path / "out" / "samples" / "step-000002" / "sheet.png"
    assert f"Samples: {sheet.parent}" in printed
    assert Image.open(sheet).convert("RGB").getextrema() != ((255, 255),) * 3
    recorded = read_info(tmp_path / "out" / "tuner.safetensors").training["config"]
    assert (recorded["batch_size"], recorded["lr_scheduler"], recorded["steps"]) == (4, "cosine", 2)


def test_a_control_tuner_is_trained(script: Callable[..., Any], images: Path, tmp_path: Path) -> None:
    process = script(
        "train/train_control.py", "--base", TINY_BASE, "--data", images, "--output", tmp_path / "out", "--steps=2",
        "--control.conditions", "palette", "--cpu",
    )  # fmt: skip
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "control     palette (made from the images)" in printed
    assert [part.part for part in read_info(tmp_path / "out" / "tuner.safetensors").configs] == ["control"]
