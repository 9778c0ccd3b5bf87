"""Files of a teacher's settings, checked without importing torch."""

from __future__ import annotations

from pathlib import Path

from ....utils.errors import DataError, TunerFileError
from ....utils.weighted_path import split_weight
from .settings import TeacherConfig


def teacher_location(argument: str) -> tuple[Path, float]:
    """Return the path and the weight of a teacher given as `FILE` or `FILE:WEIGHT`."""
    path, weight = split_weight(argument)
    # A file whose own name ends like a weight.
    if Path(argument).expanduser().exists():
        path, weight = argument, 1.0
    return Path(path).expanduser(), weight


def check_teacher_files(config: TeacherConfig) -> None:
    """Check that the teacher and the file of prompts exist.

    Raises:
        TunerFileError: if there is no teacher.
        DataError: if there is no file or folder of prompts.
    """
    if config.file is None:
        return
    path, _ = teacher_location(config.file)
    if not path.exists():
        raise TunerFileError(f"There is no teacher at {path}; give a tuner, or a LoRA file of diffusers or kohya.")
    prompts = config.prompts_file
    if prompts is not None and not prompts.expanduser().exists():
        raise DataError(f"There is no file of prompts at {prompts}; give a text file, or a folder of caption files.")
