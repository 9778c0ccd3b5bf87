from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from restune_diffusion.storage.tuner_file import load_tuner

Restune = Callable[..., tuple[int, str, str]]


def test_train_learns_from_a_teacher_without_images_and_config_yaml_repeats_it(
    restune: Restune, workplace: Path, tmp_path: Path
) -> None:
    teacher, prompts = workplace / "trained" / "disc.safetensors", tmp_path / "prompts.txt"
    prompts.write_text("a red disc\na teal disc\n")
    code, output, errors = restune(
        "train", "--base", workplace / "base", "--teacher", f"{teacher}:0.5", "--prompts-file", prompts,
        "--teacher-latents=4", "--teacher-steps=2", "--output", tmp_path / "out", "--steps=2",
        "--tuner=bypass", "--cpu",
    )  # fmt: skip
    assert code == 0, errors
    assert "latents     4 at 16 x 16, 2 captions" in output
    assert "teacher     disc.safetensors (skip), weight 0.5" in output
    file = tmp_path / "out" / "tuner.safetensors"
    _, output, _ = restune("inspect", file)
    assert "teacher     disc.safetensors, weight 0.5" in output
    assert "2 steps on 4 generated latents of 16 px" in output
    code, _, errors = restune("train", "--config", tmp_path / "out" / "config.yaml", "--output", tmp_path / "again")
    assert code == 0, errors
    one, two = (load_tuner(path).state_dict() for path in (file, tmp_path / "again" / "tuner.safetensors"))
    assert all(bool((one[key] == two[key]).all()) for key in one)
    code, _, errors = restune("report", tmp_path / "out")
    assert code == 0, errors


def test_a_teacher_needs_prompts_or_images_and_its_files(restune: Restune, workplace: Path, tmp_path: Path) -> None:
    run = ("train", "--base", workplace / "base", "--output", tmp_path)
    teacher = ("--teacher", workplace / "trained" / "disc.safetensors")
    assert restune(*run)[2].strip() == "restune: --data is required."
    assert "a teacher needs prompts or images; give --teacher-prompts or --prompts-file" in restune(*run, *teacher)[2]
    assert "data and prompts of the teacher are both given" in restune(
        *run, *teacher, "--teacher-prompts", "a disc", "--data", workplace / "images"
    )[2]  # fmt: skip
    errors = restune(*run, *teacher, "--prompts-file", tmp_path / "gone.txt")[2]
    assert f"There is no file of prompts at {tmp_path / 'gone.txt'}; give a text file" in errors
    errors = restune(*run, "--teacher", tmp_path / "gone.safetensors", "--teacher-prompts", "a disc")[2]
    assert f"There is no teacher at {tmp_path / 'gone.safetensors'}; give a tuner" in errors
