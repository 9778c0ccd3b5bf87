"""What a sweep trains: the configs that its text spans."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from typing import Any

from pydantic import ValidationError

from ...utils.errors import TrainingError
from ...utils.setting_groups import first_refused_setting
from ..config.shared_settings import SWEPT
from ..config.train_config import SETTINGS, TrainConfig

SHORT_NAMES = {"lr": "learning_rate"}
_SWEPT = sorted(SWEPT)


@dataclass(frozen=True)
class Variant:
    """One tuner of a sweep: its config, and what was swept as the user wrote it."""

    config: TrainConfig
    settings: dict[str, str]


def parse_sweep(config: TrainConfig) -> list[Variant]:
    """Return a config for each combination of the values that `config.sweep` names.

    The text is `NAME=VALUE,VALUE NAME=VALUE`. A name is that of a setting, `learning_rate` or `bypass.ratio`, or a
    short one: `lr`, or that of a setting of the tuner's parts, `ratio`. `none` leaves a setting out; where a setting
    holds several values they are joined by `+`.

    Raises:
        TrainingError: if a name is unknown or cannot differ within a sweep, or a value is not valid.
    """
    axes = [_axis(config, text) for text in _split(config.sweep or "")]
    names = [name for name, _, _ in axes]
    if not axes or len(set(names)) != len(names):
        raise TrainingError(
            f'The sweep "{config.sweep}" must name each setting once, for instance "ratio=0.1,0.25 lr=1e-4,5e-4".'
        )
    variants = [
        _variant(config, [path for _, path, _ in axes], dict(zip(names, values, strict=True)))
        for values in product(*(values for _, _, values in axes))
    ]
    folders = [variant.config.output for variant in variants]
    twice = next((folder.name for folder in folders if folders.count(folder) > 1), None)
    if twice is not None:
        raise TrainingError(f"The sweep has the tuner {twice} twice; leave one of the values out.")
    return variants


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise TrainingError(f"The sweep {text} cannot be read: {error}.") from error


def _axis(config: TrainConfig, text: str) -> tuple[str, list[str], list[str]]:
    name, given, values = text.partition("=")
    chosen = [value for value in values.split(",") if value]
    if not given or not chosen:
        raise TrainingError(f"The sweep names no values in `{text}`; write them as NAME=VALUE,VALUE.")
    return name, _path(config, name), chosen


def _path(config: TrainConfig, name: str) -> list[str]:
    """Find the setting that a name means."""
    full = SHORT_NAMES.get(name, name)
    if full in _SWEPT:
        return list(SETTINGS[full].place)
    of_parts = [f"{kind}.{setting}" for kind, setting in _part_settings(config)]
    if full in of_parts:
        return full.split(".")
    found = [path for path in of_parts if path.endswith(f".{full}")]
    if len(found) == 1:
        return found[0].split(".")
    if found:
        raise TrainingError(f"The sweep's {name} may be {' or '.join(found)}; write which.")
    if full in SETTINGS:
        raise TrainingError(
            f"The tuners of a sweep share a base and its encoded images, so {name} cannot differ among them; "
            f"train with another {name} by a command of its own."
        )
    known = [*SHORT_NAMES, *_SWEPT, *of_parts, *(path.split(".")[1] for path in of_parts)]
    near = get_close_matches(full, known, n=1)
    meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
    raise TrainingError(f"There is no setting {name} to sweep; {meant}")


def _part_settings(config: TrainConfig) -> Iterator[tuple[str, str]]:
    for kind, part in zip(config.kinds, config.parts, strict=True):
        for setting in type(part).model_fields:
            if setting != "part":
                yield kind, setting


def _variant(config: TrainConfig, paths: list[list[str]], settings: dict[str, str]) -> Variant:
    label = re.sub(r"[^\w.\-]", "_", "-".join(name.split(".")[-1] + value for name, value in settings.items()))
    values: dict[str, Any] = config.model_dump()
    for path, text in zip(paths, settings.values(), strict=True):
        place: dict[str, Any] = values
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = _value(text, place[path[-1]])
    name = f"{config.name}-{label}"
    values |= {"name": name, "output": config.output / name, "sweep": None}
    values["feature_cache"]["folder"] = config.feature_cache_folder
    try:
        return Variant(TrainConfig.model_validate(values), settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first_refused_setting(TrainConfig, error).place))
        reason = " ".join([where, first["msg"].removeprefix("Value error, ")]).strip()
        raise TrainingError(f"The tuner {name} of the sweep is refused: {reason}.") from error


def _value(text: str, now: Any) -> Any:
    if text.lower() == "none":
        return None
    return tuple(text.split("+")) if isinstance(now, tuple) else text
