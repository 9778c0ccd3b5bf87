"""Read and write training settings as YAML: the file of `--config` and the `config.yaml` of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...utils.errors import SettingsError
from ...utils.setting_groups import close_groups, open_groups
from ...utils.settings_merge import Place, RefusedSetting, first_unknown, layered
from ...utils.yaml_file import YamlFile, read_yaml, to_yaml
from .length.precedence import without_replaced_length
from .presets import PRESETS
from .renamed import renamed, warn
from .train_config import TrainConfig, checked_settings, current_names
from .tuner_settings import with_families, without_aliases


@dataclass(frozen=True)
class _Given:
    """Settings by current flat name, with their places in the YAML file, if they come from one."""

    flat: dict[str, Any]
    places: dict[str, Place]
    old: Mapping[Place, Place]
    file: YamlFile | None = None

    def refused(self, refused: RefusedSetting) -> SettingsError:
        """Return the error for a setting, with its line number and the name that the file uses for it."""
        place = tuple(refused.place)
        if place and place[0] in self.places:
            place = (*self.places[place[0]], *place[1:])
        for now, before in self.old.items():
            if place[: len(now)] == now:
                place = (*before, *place[len(now) :])
        return _error(self.file, RefusedSetting(place, refused.reason))


def read_config(path: Path | str, **overrides: Any) -> TrainConfig:
    """Read all settings of a run from a YAML file.

    Args:
        path: path of the file.
        overrides: settings that take precedence over the file; a group, for instance `validation`, takes a mapping.

    Raises:
        SettingsError: if the file is not valid YAML, or a setting is unknown, missing or invalid; includes the line
            number.
    """
    given = _opened(read_yaml(Path(path)))
    try:
        over = _flat(overrides)
    except RefusedSetting as refused:
        raise _error(None, refused) from refused
    try:
        return TrainConfig.model_validate(layered(without_replaced_length(given.flat, over), over))
    except ValidationError as error:
        first = TrainConfig.refused(error)
        overridden = bool(first.place) and first.place[0] in over
        raise (_error(None, first) if overridden else given.refused(first)) from error


def given_settings(
    path: Path | YamlFile | None,
    preset: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    tuner: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return the settings of a YAML file and a preset by flat name, converted to their types.

    Each setting is checked on its own. Precedence, from high to low: file, `defaults`, preset.

    Args:
        path: path of the YAML file, or what was read from it, if there is one.
        preset: name of a preset; replaces the one that the file names.
        defaults: default settings of the calling script.
        tuner: tuner families and aliases; they replace those of the file.

    Raises:
        SettingsError: if the file cannot be read or a setting in it is invalid; includes the line number.
    """
    file = read_yaml(path) if isinstance(path, Path) else path
    given = _opened(file) if file is not None else _Given({}, {}, {})
    named: dict[str, Any] = {"preset": preset} if preset is not None else {}
    if tuner:
        named["tuner"] = tuple(tuner) if len(tuner) > 1 else tuner[0]
    settings = layered(without_replaced_length(_flat(defaults or {}), given.flat), given.flat, named)
    try:
        below = checked_settings({"preset": settings.get("preset")})["preset"]
        return checked_settings(without_aliases(settings, PRESETS[below].settings if below else {}))
    except RefusedSetting as refused:
        raise given.refused(refused) from refused


def config_yaml(config: TrainConfig) -> str:
    """Return all settings of a run as YAML that reproduces the run from any working directory."""
    left_out: dict[str, Any] = dict.fromkeys(config.untrained, True)
    if config.teacher.generates:
        left_out["data"] = {"folder"}
    settings = config.model_dump(exclude={**left_out, "checkpoints": {"resume"}})
    settings = _plain(settings)
    if Path(config.base).expanduser().exists():
        settings["base"] = str(Path(config.base).expanduser().absolute())
    if config.vae is not None and Path(config.vae).expanduser().exists():
        settings["vae"] = str(Path(config.vae).expanduser().absolute())
    if config.teacher.file is not None:
        settings["teacher"]["file"] = str(Path(config.teacher.file).expanduser().absolute())
    return to_yaml(_without_part_names(settings))


def recorded_yaml(recorded: Mapping[str, Any]) -> str:
    """Return the settings recorded in a tuner's file as YAML; they do not include the data and output folders.

    Args:
        recorded: the value of `config` in the training facts of a tuner's file.
    """
    return to_yaml(_without_part_names(current_names(recorded)))


def _opened(file: YamlFile) -> _Given:
    """Return the settings of a file, after checking that each name is known and given once."""
    old: Mapping[Place, Place] = {}
    try:
        current = renamed(file.values, tell=lambda text, place: warn(str(_error(file, RefusedSetting(place, text)))))
        old = current.given
        flat, places = open_groups(with_families(TrainConfig), current.values)
        unknown = first_unknown(with_families(TrainConfig), close_groups(with_families(TrainConfig), flat))
        if unknown is not None:
            raise RefusedSetting(*unknown)
    except RefusedSetting as refused:
        raise _Given({}, {}, old, file).refused(refused) from refused
    return _Given(flat, places, old, file)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    return open_groups(with_families(TrainConfig), renamed(values).values)[0]


def _error(file: YamlFile | None, refused: RefusedSetting) -> SettingsError:
    if file is not None:
        return file.refused(refused.place, refused.reason)
    return SettingsError(refused.sentence())


def _plain(value: Any) -> Any:
    """Convert a value to plain YAML types; paths become absolute."""
    if isinstance(value, Path):
        return str(value.expanduser().absolute())
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (tuple, list)) else value


def _without_part_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the constant field `part`, which identifies the family of a part in a tuner's header."""
    return {
        name: {key: each for key, each in value.items() if key != "part"} if isinstance(value, dict) else value
        for name, value in settings.items()
    }
