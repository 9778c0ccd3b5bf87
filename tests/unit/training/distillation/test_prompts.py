from __future__ import annotations

from pathlib import Path

import pytest

from restune_diffusion.data.config import DataConfig
from restune_diffusion.training.config.teacher.files import check_teacher_files, teacher_location
from restune_diffusion.training.config.teacher.settings import TeacherConfig
from restune_diffusion.training.distillation.prompts import prompt_examples, read_prompts
from restune_diffusion.utils.errors import DataError, TunerFileError

DATA = DataConfig(folder=Path("none"), trigger_word="sks")


def test_prompts_are_lines_of_a_file_or_captions_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\ufeffa fox\n\n  a hen, sks \n")
    assert read_prompts(tmp_path / "prompts.txt") == ["a fox", "a hen, sks"]
    folder = tmp_path / "captions"
    (folder / "inner").mkdir(parents=True)
    (folder / "b.txt").write_text("a bee,\nblue")
    (folder / "inner" / "c.caption").write_text("a cat")
    (folder / "b.png").write_bytes(b"no image")
    assert read_prompts(folder) == ["a bee, blue", "a cat"]


def test_prompts_take_turns_and_get_the_trigger_word() -> None:
    config = TeacherConfig(file="t", prompts=("a fox", "a hen, sks"), latents=3)
    captions = [example.caption for example in prompt_examples(config, DATA)]
    assert captions == ["sks, a fox", "a hen, sks", "sks, a fox"]
    assert len(prompt_examples(TeacherConfig(file="t", prompts=("a",)), DATA)) == 128
    assert len(prompt_examples(TeacherConfig(file="t", prompts=("a", "b") * 100), DATA)) == 200


def test_files_without_prompts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match=r"empty.txt has no prompts; write one per line\."):
        read_prompts(tmp_path / "empty.txt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"folder has no captions; put .txt or .caption files there"):
        read_prompts(tmp_path / "folder")
    (tmp_path / "nul.txt").write_text("a fox\na\0hen")
    with pytest.raises(DataError, match=r"Line 2 of .*nul.txt has a caption with NUL characters; save it as UTF-8\."):
        read_prompts(tmp_path / "nul.txt")


def test_missing_files_are_named(tmp_path: Path) -> None:
    teacher = tmp_path / "a.safetensors"
    with pytest.raises(TunerFileError, match="There is no teacher at"):
        check_teacher_files(TeacherConfig(file=f"{teacher}:0.5", prompts=("a",)))
    teacher.touch()
    check_teacher_files(TeacherConfig(file=f"{teacher}:0.5", prompts=("a",)))
    with pytest.raises(DataError, match="There is no file of prompts at gone; give a text file"):
        check_teacher_files(TeacherConfig(file=str(teacher), prompts_file=Path("gone")))


def test_a_weight_follows_the_file_unless_it_is_part_of_its_name(tmp_path: Path) -> None:
    file = tmp_path / "lora:2"
    assert teacher_location(f"{file}") == (tmp_path / "lora", 2.0)
    file.touch()
    assert teacher_location(f"{file}") == (file, 1.0)
    assert teacher_location(f"{file}:0.5") == (file, 0.5)
