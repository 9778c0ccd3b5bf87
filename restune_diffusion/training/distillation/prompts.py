"""Prompts of a run without images, from the settings or from a file or folder."""

from __future__ import annotations

from pathlib import Path

from ...data.captions import apply_rule
from ...data.config import DataConfig
from ...data.conventions.caption_files import is_caption_file
from ...data.example import Example, check_caption
from ...data.files import list_files, read_text
from ...utils.errors import DataError
from ..config.teacher.settings import TeacherConfig

DEFAULT_LATENTS = 128


def prompt_examples(teacher: TeacherConfig, data: DataConfig) -> list[Example]:
    """Return an example without a file for each latent to generate; the prompts take turns.

    Args:
        teacher: settings of the teacher, with prompts or a file of prompts.
        data: settings of the trigger word and the caption template, which apply to prompts as to captions.

    Raises:
        DataError: if the file or folder cannot be read, or has no prompt.
    """
    prompts = teacher.prompts if teacher.prompts_file is None else read_prompts(teacher.prompts_file.expanduser())
    prompts = [apply_rule(prompt.strip(), data) for prompt in prompts]
    count = teacher.latents or max(DEFAULT_LATENTS, len(prompts))
    return [Example(Path(f"latent-{number:06d}"), prompts[number % len(prompts)]) for number in range(count)]


def read_prompts(path: Path) -> list[str]:
    """Return the lines of a text file, or the captions of a folder of caption files, without empty ones.

    Raises:
        DataError: if a file cannot be read, or there is no prompt.
    """
    if path.is_dir():
        found = [(str(file), read_text(file)) for file in list_files(path, []) if is_caption_file(file)]
        texts = [(name, " ".join(text.split())) for name, text in found]
        missing = f"The folder {path} has no captions; put .txt or .caption files there, or give a file of prompts."
    else:
        texts = [(f"Line {number} of {path}", line) for number, line in enumerate(read_text(path).splitlines(), 1)]
        missing = f"The file {path} has no prompts; write one per line."
    prompts = []
    for name, text in texts:
        if text.strip():
            try:
                check_caption(text)
            except DataError as error:
                raise DataError(f"{name} {error}.") from error
            prompts.append(text.strip())
    if not prompts:
        raise DataError(missing)
    return prompts
