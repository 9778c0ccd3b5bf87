"""Read a pasted command or YAML as the settings of a run, with the parser of `restune train` and without a shell."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import BaseModel

from ....storage.base_files.location import is_hub_id
from ....training.config.config_file import given_settings
from ....training.config.train_config import TrainConfig
from ....utils.display import printable
from ....utils.errors import UsageError
from ....utils.yaml_file import parse_yaml
from ...workspace import Workspace

CommandReader: TypeAlias = Callable[[Sequence[str], Mapping[str, Any]], TrainConfig]
"""Function from the arguments of `restune train`, and defaults for required settings, to a config."""

_LONGEST = 100_000
# These flags read a file of settings, whose content would come from this machine and not from the page.
_FILE_FLAGS = ("--config", "--config-file", "--dataset-config", "--sample-prompts", "--prompts-file")
_PASTED = Path("The pasted text")


def read_pasted(text: str, defaults: Mapping[str, Any], read_command: CommandReader) -> TrainConfig:
    """Return the config of a pasted command or of pasted YAML.

    Args:
        text: a command that begins with `restune train` or with a flag, or settings in YAML.
        defaults: the settings `base`, `data` and `output`, for a text that does not name them.
        read_command: parser of `restune train`.

    Raises:
        RestuneError: if the text cannot be read, or a setting is invalid; one sentence names the first mistake.
    """
    text = text.strip()
    if not text:
        raise UsageError("There is no text to read; paste a `restune train` command, or settings in YAML.")
    if len(text) > _LONGEST:
        raise UsageError(f"The text is longer than {_LONGEST:,} characters; paste one command or one YAML file.")
    if not _is_command(text):
        given = given_settings(parse_yaml(text, _PASTED))
        config = TrainConfig(**{**defaults, **given})
    else:
        config = read_command(_arguments(text), defaults)
    if config.sweep is not None:
        raise UsageError("A sweep trains several tuners, which this page does not show; run it as a command.")
    return config


def check_places(config: TrainConfig, workspace: Workspace, bases: Sequence[str]) -> TrainConfig:
    """Return a config whose paths all lie in the folders of the studio.

    Args:
        config: a config from the page.
        workspace: folders of the studio.
        bases: bases that the studio offers.

    Raises:
        UsageError: if a path leads elsewhere.
    """
    roots = (workspace.home, *workspace.data_folders)
    for name, path in _paths(config):
        if name not in ("data.folder", "output"):
            workspace.inside(path, *roots)
    data = workspace.inside(config.data.folder, workspace.data, *workspace.data_folders)
    models = {"base": config.base, **({} if config.vae is None else {"vae": config.vae})}
    if config.teacher.file is not None:
        models["teacher"] = str(config.teacher.file)
    for name, source in models.items():
        if source not in bases and not is_hub_id(source):
            if name == "base":
                raise UsageError(
                    f"The base {printable(source, 80)!r} is not one of this studio; start it with --base, or name a "
                    "repository on the Hub."
                )
            workspace.inside(source, *roots)
    return config.model_copy(update={"data": config.data.model_copy(update={"folder": data})})


def _is_command(text: str) -> bool:
    first = text.split(maxsplit=1)[0]
    return first.startswith("--") or first in ("restune", "python", "accelerate", "train") or first.endswith(".py")


def _arguments(text: str) -> list[str]:
    # A shell joins lines at a backslash; shlex keeps the line break.
    joined = re.sub(r"\\\r?\n", " ", text)
    try:
        words = shlex.split(joined)
    except ValueError as error:
        raise UsageError(f"The command cannot be read ({str(error).lower()}); check its quotation marks.") from error
    start = next((number for number, word in enumerate(words) if word.startswith("-")), len(words))
    for word in words[start:]:
        flag = word.partition("=")[0].replace("_", "-").lower()
        if flag in _FILE_FLAGS:
            raise UsageError(f"{flag} reads a file, which this page does not; paste the settings of the file instead.")
        if flag in ("-h", "--help"):
            raise UsageError("The command asks for help; paste one that trains.")
    return words[start:]


def _paths(value: Any, name: str = "") -> Iterator[tuple[str, Path]]:
    if isinstance(value, Path):
        yield name, value
    elif isinstance(value, BaseModel):
        for key in type(value).model_fields:
            yield from _paths(getattr(value, key), f"{name}.{key}" if name else key)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _paths(each, name)
