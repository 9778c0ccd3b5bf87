"""Flags from kohya's TOML files: `--config_file`, with sections or without, and `--dataset_config`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...utils.errors import SettingsError
from .entry import ForeignFlag

_RENAMED = {"batch_size": "train_batch_size"}


def from_toml(arguments: Sequence[str], table: Mapping[str, ForeignFlag]) -> list[str]:
    """Return arguments with the settings of both files before them, so that flags take precedence.

    Raises:
        SettingsError: if a file cannot be read or has a setting that is unknown or has no equivalent.
    """
    rest: list[str] = []
    files: dict[str, str] = {}
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        flag, equals, value = argument.partition("=")
        name = flag[2:].replace("-", "_")
        if flag.startswith("--") and name in ("config_file", "dataset_config"):
            if not equals and not pending:
                raise SettingsError(f"{flag} needs a TOML file.")
            files[name] = value if equals else pending.pop(0)
        else:
            rest.append(argument)
    settings: dict[str, Any] = {}
    own: list[str] = []
    if "config_file" in files:
        path = Path(files["config_file"])
        settings |= _sections(_read(path if path.suffix == ".toml" else Path(f"{path}.toml")))
        files.setdefault("dataset_config", settings.pop("dataset_config", ""))
    if files.get("dataset_config"):
        path = Path(files["dataset_config"])
        found, own = _dataset(_read(path), path)
        settings |= found
    given = {argument.partition("=")[0][2:].replace("-", "_") for argument in rest if argument.startswith("--")}
    ahead: list[str] = []
    for name, value in settings.items():
        if name not in table:
            raise SettingsError(f"{name} in a TOML file is not a setting of kohya's train_network.py; remove it.")
        if name not in given:
            ahead += _flag(name, value, table[name])
    return [*ahead, *own, *rest]


def _flag(name: str, value: Any, flag: ForeignFlag) -> list[str]:
    if flag.takes == "nothing":
        return [f"--{name}"] if value is True else []
    if isinstance(value, list) and flag.takes == "value":
        return [f"--{name}", ",".join(map(str, value))]
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])] if value not in (None, "") else []


def _sections(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def _dataset(settings: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the flags of a dataset file with one folder of images, and optionally one of class images."""
    unknown = settings.keys() - {"general", "datasets"}
    datasets = settings.get("datasets", [])
    if unknown or len(datasets) != 1:
        raise SettingsError(f"{path} must have one [[datasets]]; put all images into one folder.")
    dataset = dict(datasets[0])
    subsets = dataset.pop("subsets", [])
    trained = [subset for subset in subsets if not subset.get("is_reg")]
    classes = [subset for subset in subsets if subset.get("is_reg")]
    if len(trained) != 1 or len(classes) > 1:
        raise SettingsError(f"{path} must have one subset of images; put all images into one folder.")
    merged = {**settings.get("general", {}), **dataset, **trained[0]}
    merged.pop("is_reg", None)
    folder, repeats = merged.pop("image_dir", None), merged.pop("num_repeats", 1)
    if folder is None:
        raise SettingsError(f"The subset of {path} has no image_dir; add it.")
    if repeats != 1:
        raise SettingsError(f"num_repeats = {repeats} in {path} has no equivalent; set --steps, and num_repeats = 1.")
    own = ["--data", str(folder)]
    if "class_tokens" in merged:
        own += ["--prompt", str(merged.pop("class_tokens"))]
    if classes:
        merged["reg_data_dir"] = classes[0].get("image_dir", "")
        if "class_tokens" in classes[0]:
            own += ["--class-prompt", str(classes[0]["class_tokens"])]
    return {_RENAMED.get(name, name): value for name, value in merged.items()}, own


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"The file {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"The file {path} is not valid TOML: {error}.") from error
