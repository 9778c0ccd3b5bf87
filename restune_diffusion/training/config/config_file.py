"""A training run's settings from YAML, and as YAML: what `--config` takes and what a run writes down."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...utils.errors import SettingsError
from ...utils.settings_merge import RefusedSetting, checked_fields, first_refused, first_unknown, layered
from ...utils.yaml_file import YamlFile, read_yaml, to_yaml
from .presets import PRESETS
from .train_config import TrainConfig
from .tuner_settings import with_families


def read_config(path: Path | str, **overrides: Any) -> TrainConfig:
    """Read all settings of a run from a YAML file.

    Args:
        path: the file.
        overrides: settings that win over the file's; a group, for instance `validation`, takes a mapping.

    Raises:
        SettingsError: if the file is no valid YAML, or a setting is unknown, missing or not allowed; names the line.
    """
    file = read_yaml(Path(path))
    _check_names(file)
    try:
        return TrainConfig(**layered(file.values, overrides))
    except ValidationError as error:
        refused = first_refused(error)
        overridden = bool(refused.place) and refused.place[0] in overrides
        raise _in_file(None if overridden else file, refused) from error


def given_settings(
    path: Path | None, preset: str | None = None, defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the settings that a file and a preset give, checked one by one, in the types of `TrainConfig`.

    Args:
        path: a YAML file, which wins over `defaults`, and these over the preset.
        preset: name of a preset, instead of the one that the file names.
        defaults: settings of a script of its own.

    Raises:
        SettingsError: if the file or a setting in it cannot be used; names the line.
    """
    file = read_yaml(path) if path is not None else None
    if file is not None:
        _check_names(file)
    named = {"preset": preset} if preset is not None else {}
    settings = layered(defaults or {}, file.values if file is not None else {}, named)
    try:
        below = checked_fields(TrainConfig, {"preset": settings.get("preset")})["preset"]
        return checked_fields(with_families(TrainConfig), layered(PRESETS[below].settings if below else {}, settings))
    except RefusedSetting as refused:
        raise _in_file(file, refused) from refused


def config_yaml(config: TrainConfig) -> str:
    """Write all settings of a run as YAML that gives the same run again, from any working directory."""
    settings = config.model_dump(mode="json", exclude={"resume", *config.untrained})
    for name, value in config:
        if isinstance(value, Path):
            settings[name] = str(value.expanduser().absolute())
    images = config.validation.control_images
    settings["validation"]["control_images"] = [str(image.expanduser().absolute()) for image in images]
    if Path(config.base).expanduser().exists():
        settings["base"] = str(Path(config.base).expanduser().absolute())
    return to_yaml(_without_part_names(settings))


def recorded_yaml(recorded: Mapping[str, Any]) -> str:
    """Write the settings that a tuner's file records as YAML; data and output are not among them.

    Args:
        recorded: the value of `config` among the training facts of a tuner's file.
    """
    return to_yaml(_without_part_names(recorded))


def _check_names(file: YamlFile) -> None:
    unknown = first_unknown(with_families(TrainConfig), file.values)
    if unknown is not None:
        raise file.refused(*unknown)


def _in_file(file: YamlFile | None, refused: RefusedSetting) -> SettingsError:
    if file is not None:
        return file.refused(refused.place, refused.reason)
    return SettingsError(f"{'.'.join(map(str, refused.place))}: {refused.reason}" if refused.place else refused.reason)


def _without_part_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the constant by which a part's settings are told apart in a tuner's header."""
    return {
        name: {key: each for key, each in value.items() if key != "part"} if isinstance(value, dict) else value
        for name, value in settings.items()
    }
