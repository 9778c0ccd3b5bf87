"""Grid of a sweep: configs for all combinations of settings in its text."""

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
from ..config.length.precedence import without_replaced_length
from ..config.shared_settings import SWEPT
from ..config.train_config import SETTINGS, TrainConfig

SHORT_NAMES = {"lr": "learning_rate"}
_SWEPT = sorted(SWEPT)


@dataclass(frozen=True)
class Variant:
    """One tuner of a sweep: its config, and the swept settings as the user wrote them."""

    config: TrainConfig
    settings: dict[str, str]


def parse_sweep(config: TrainConfig) -> list[Variant]:
    """Return a config for each combination of the values that `config.sweep` names.

    The text is `NAME=VALUE,VALUE NAME=VALUE`. A name is a setting, such as `learning_rate` or `bypass.ratio`, or a
    short name: `lr`, or a setting of the tuner's parts, such as `ratio`. `none` unsets a setting. A setting with
    several values joins them with `+`.

    Raises:
        TrainingError: if a name is unknown or cannot differ within a sweep, or a value is invalid.
    """
    axes = [_axis(config, text) for text in _split(config.sweep or "")]
    names = [name for name, _, _ in axes]
    if not axes or len(set(names)) != len(names):
        raise TrainingError(
            f'The sweep "{config.sweep}" must name each setting once, for example "ratio=0.1,0.25 lr=1e-4,5e-4".'
        )
    variants = [
        _variant(config, [path for _, path, _ in axes], dict(zip(names, values, strict=True)))
        for values in product(*(values for _, _, values in axes))
    ]
    folders = [variant.config.output for variant in variants]
    twice = next((folder.name for folder in folders if folders.count(folder) > 1), None)
    if twice is not None:
        raise TrainingError(f"The sweep contains the tuner {twice} twice; remove one of the values.")
    return variants


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise TrainingError(
            f"The sweep `{text}` cannot be read: {error}. Write it as NAME=VALUE,VALUE NAME=VALUE."
        ) from error


def _axis(config: TrainConfig, text: str) -> tuple[str, list[str], list[str]]:
    name, given, values = text.partition("=")
    chosen = [value for value in values.split(",") if value]
    if not given or not chosen:
        raise TrainingError(f"The sweep names no values in `{text}`; write them as NAME=VALUE,VALUE.")
    return name, _path(config, name), chosen


def _path(config: TrainConfig, name: str) -> list[str]:
    """Return the path of the setting that a name refers to."""
    full = SHORT_NAMES.get(name, name)
    if full in _SWEPT:
        return list(SETTINGS[full].place)
    of_parts = [f"{family}.{setting}" for family, setting in _part_settings(config)]
    if full in of_parts:
        return full.split(".")
    found = [path for path in of_parts if path.endswith(f".{full}")]
    if len(found) == 1:
        return found[0].split(".")
    if found:
        raise TrainingError(f"The sweep's `{name}` is ambiguous; write {' or '.join(found)}.")
    if full in SETTINGS:
        raise TrainingError(
            f"The tuners of a sweep share a base and its encoded images, so {name} cannot differ among them; "
            f"use a separate run for another {name}."
        )
    known = [*SHORT_NAMES, *_SWEPT, *of_parts, *(path.split(".")[1] for path in of_parts)]
    near = get_close_matches(full, known, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Available settings: {', '.join(known)}."
    raise TrainingError(f"The sweep has an unknown setting `{name}`. {hint}")


def _part_settings(config: TrainConfig) -> Iterator[tuple[str, str]]:
    for family, part in zip(config.kinds, config.parts, strict=True):
        for setting in type(part).model_fields:
            if setting != "part":
                yield family, setting


def _variant(config: TrainConfig, paths: list[list[str]], settings: dict[str, str]) -> Variant:
    label = re.sub(r"[^\w.\-]", "_", "-".join(name.split(".")[-1] + value for name, value in settings.items()))
    values: dict[str, Any] = without_replaced_length(config.model_dump(), {path[0]: path for path in paths})
    for path, text in zip(paths, settings.values(), strict=True):
        place: dict[str, Any] = values
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = _value(text, place.get(path[-1]))
    name = f"{config.name}-{label}"
    values |= {"name": name, "output": config.output / name, "sweep": None}
    values["feature_cache"]["folder"] = config.feature_cache_folder
    try:
        return Variant(TrainConfig.model_validate(values), settings)
    except ValidationError as error:
        reason = TrainConfig.refused(error).sentence()
        raise TrainingError(f"The sweep's tuner {name} has invalid settings: {reason}.") from error


def _value(text: str, now: Any) -> Any:
    if text.lower() == "none":
        return None
    return tuple(text.split("+")) if isinstance(now, tuple) else text
