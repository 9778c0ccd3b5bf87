"""Convert between the fields of the form and the settings of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ....training.config.train_config import TrainConfig, current_settings
from ....utils.settings_merge import layered
from .fields import Field, all_fields

CUSTOM = "custom"
"""Purpose of settings without a preset."""
_FIRST = ("base", "vae", "data", "output", "preset")
# A preset's class prompt would do nothing without a method.
_METHOD = "output"


def default_config(preset: str | None, base: str = "base") -> TrainConfig:
    """Return the config of a preset with nothing else set."""
    return TrainConfig(base=base, data="data", output="output", preset=preset)


def form_values(config: TrainConfig) -> dict[str, Any]:
    """Return the values of all fields for a config, by the name of the setting."""
    return {field.name: field.of(config) for field in all_fields()}


def settings_of(
    values: Mapping[str, Any], others: Mapping[str, Any], places: Mapping[str, Any], preset: str | None
) -> dict[str, Any]:
    """Return the settings of a run, those alone that differ from the preset's, as in a YAML file.

    Args:
        values: values of the fields by name.
        others: settings without a field.
        places: the settings `base`, `data` and `output`.
        preset: name of the preset, or None.
    """
    reference = default_config(preset)
    fields = {field.name: field for field in all_fields()}
    kinds = fields["tuner"].parsed(values.get("tuner")) or list(reference.kinds)
    settings: dict[str, Any] = {**places, **({} if preset is None else {"preset": preset})}
    for field in fields.values():
        if field.name not in values or not field.matters(kinds):
            continue
        value = field.parsed(values[field.name])
        if value != field.parsed(field.of(reference)):
            _put(settings, field, value)
    if settings.get("class_prompt") and "preservation" not in others:
        settings["preservation"] = _METHOD
    return layered(settings, others)


def differences(config: TrainConfig) -> dict[str, Any]:
    """Return the settings of a config that differ from its preset's, as plain values by flat name."""
    reference = default_config(config.preset)
    found: dict[str, Any] = {}
    for name, info in current_settings().items():
        if name in _FIRST or name == "output" or info.place[0] in config.untrained:
            continue
        value, default = info.of(config), info.of(reference) if hasattr(reference, info.place[0]) else None
        if isinstance(value, BaseModel):
            before = default.model_dump(mode="json") if isinstance(default, BaseModel) else {}
            fresh = {
                key: each for key, each in value.model_dump(mode="json").items() if each != before.get(key, _ABSENT)
            }
            fresh.pop("part", None)
            if fresh:
                found[name] = fresh
        elif value != default:
            found[name] = _plain(value)
    return found


def other_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings of a config that have no field and differ from its preset's."""
    others = differences(config)
    # A base's own autoencoder is replaced without a field.
    if config.vae is not None:
        others["vae"] = config.vae
    for field in all_fields():
        group, *inner = field.place
        if not (field.holds(config) and field.matters(config.kinds)):
            continue
        if not inner:
            others.pop(group, None)
        elif isinstance(others.get(group), dict):
            others[group].pop(inner[0], None)
            if not others[group]:
                del others[group]
    # The form preserves a class that it names.
    if config.preservation.class_prompt and "class_prompt" not in others:
        others["preservation"] = config.preservation.method
        if config.preservation.method == _METHOD:
            del others["preservation"]
    return others


_ABSENT = object()


def _put(settings: dict[str, Any], field: Field, value: Any) -> None:
    group, *inner = field.place
    if field.name == "text.tokens":
        value = str(value or "").split()
    elif field.name == "text.initializers":
        value = [str(value)] if value else []
    elif field.name == "tuner" and len(value) == 1:
        value = value[0]
    if inner:
        settings.setdefault(group, {})[inner[0]] = value
    else:
        settings[group] = value


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value
