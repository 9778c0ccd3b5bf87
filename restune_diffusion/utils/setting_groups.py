"""Groups of settings whose fields also have flat names and are annotated with what they affect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from .settings import Settings
from .settings_merge import Place, RefusedSetting, first_refused, unknown_name

Affects: TypeAlias = Literal["batches", "order", "content", "tuner", "output"]
"""Effect of a setting. `batches`: the content of the training batches. `order`: only which samples form a batch.
`content`: the base's weights or the captions, which are compared by hash. `tuner`: only what is learned from a batch.
`output`: nothing in the tuner. A resumed run may change only settings with `output`."""

_KEY = "restune"


@dataclass(frozen=True)
class SettingInfo:
    """Description of one setting of a model with groups.

    Attributes:
        name: flat name, used by flags and flat files.
        place: names of the group, if any, and of the field.
        field: pydantic field.
        affects: effect of the setting.
        record: name among the recorded settings; None if it is not recorded.
        swept: whether the tuners of a sweep may differ in it although it affects the batches.
        recorded_default: whether it is recorded while it has its default value.
    """

    name: str
    place: tuple[str, ...]
    field: FieldInfo
    affects: Affects
    record: str | None
    swept: bool
    recorded_default: bool = True

    def of(self, config: BaseModel) -> Any:
        """Return the value of the setting."""
        value: Any = config
        for name in self.place:
            value = getattr(value, name)
        return value


class SettingGroup(Settings):
    """Group of settings that also accepts flat names, such as `learning_rate` of `optimizer`."""

    @model_validator(mode="before")
    @classmethod
    def _own_names(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        own = {flat_name(name, field): name for name, field in cls.model_fields.items()}
        return {own.get(name, name): value for name, value in values.items()}


def setting(
    default: Any = PydanticUndefined,
    *,
    affects: Affects,
    flat: str | None = None,
    recorded: bool | str = True,
    recorded_default: bool = True,
    swept: bool = False,
    expected: str | None = None,
    **constraints: Any,
) -> Any:
    """Define a field with its effect, as a pydantic `Field`.

    Args:
        default: default value; the setting is required if omitted.
        affects: effect of the setting.
        flat: flat name, if it differs from the name of the field.
        recorded: whether the tuner's file records the setting, or the name under which it does.
        recorded_default: False for a setting of a later release: it is not recorded while it has its default value, so
            that the records of earlier releases hold.
        swept: whether the tuners of a sweep may differ in it; settings that affect only the tuner always may.
        expected: description of the allowed values for error messages, if their type does not tell it.
        constraints: arguments of pydantic's `Field`.
    """
    annotation: dict[str, Any] = {"affects": affects, "flat": flat, "recorded": recorded, "swept": swept}
    annotation |= {"recorded_default": recorded_default, "expected": expected}
    return Field(default, json_schema_extra={_KEY: annotation}, **constraints)


def is_annotated(field: FieldInfo) -> bool:
    """Return whether a field is defined by `setting`."""
    return isinstance(field.json_schema_extra, dict) and _KEY in field.json_schema_extra


def flat_name(name: str, field: FieldInfo) -> str:
    """Return the flat name of a field of a group."""
    annotation: Any = field.json_schema_extra
    return (annotation[_KEY]["flat"] if is_annotated(field) else None) or name


def group_of(field: FieldInfo) -> type[SettingGroup] | None:
    """Return the group class of a field, or None if the field is not a group."""
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, SettingGroup) else None


def all_settings(model: type[BaseModel], elsewhere: Mapping[str, Affects] | None = None) -> dict[str, SettingInfo]:
    """Return the settings of a model and of its groups by flat name, in their order.

    Args:
        model: the model.
        elsewhere: effects of the fields that are not defined by `setting`.

    Raises:
        TypeError: if a field is not annotated, or two fields have the same flat name.
    """
    found: dict[str, SettingInfo] = {}
    for name, field in model.model_fields.items():
        group = group_of(field)
        members = group.model_fields if group is not None else {name: field}
        for inner, member in members.items():
            info = _info(member, inner, (name, inner) if group is not None else (name,), elsewhere or {})
            if info.name in found:
                raise TypeError(f"{model.__name__} has two settings with the flat name {info.name}.")
            found[info.name] = info
    return found


def open_groups(
    model: type[BaseModel], values: Mapping[Any, Any], *, later_wins: bool = False
) -> tuple[dict[str, Any], dict[str, Place]]:
    """Return settings by flat name, and the path under which each was given.

    A group may be a mapping or an instance, whose explicitly set fields are used.

    Args:
        model: the model.
        values: settings by flat name and in groups.
        later_wins: whether the later value applies if a setting is given both flat and in its group; otherwise that is
            an error.

    Raises:
        RefusedSetting: if a name is unknown, or a setting is given twice.
    """
    flat: dict[str, Any] = {}
    places: dict[str, Place] = {}
    known = _flat_names(model)
    for name, value in values.items():
        group = group_of(model.model_fields[name]) if name in model.model_fields else None
        if group is not None and isinstance(value, group):
            value = {inner: getattr(value, inner) for inner in group.model_fields if inner in value.model_fields_set}
        if group is not None and isinstance(value, Mapping):
            opened: list[tuple[str, Any, Place]] = [
                (_flat_in(group, name, inner, known), each, (name, inner)) for inner, each in value.items()
            ]
        elif name in known:
            opened = [(name, value, (name,))]
        elif group is not None:
            raise RefusedSetting((name,), "expected a group of named settings")
        else:
            raise RefusedSetting((name,), unknown_name(name, known))
        for key, each, place in opened:
            if key in flat and not later_wins:
                twice = " and ".join(".".join(map(str, where)) for where in (places[key], place))
                raise RefusedSetting(place, f"{key} is given twice, as {twice}; keep one")
            flat[key], places[key] = each, place
    return flat, places


def close_groups(model: type[BaseModel], flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by flat name as values of the model, sorted into their groups."""
    known = _flat_names(model)
    values: dict[str, Any] = {}
    for name, value in flat.items():
        group, *inner = known[name]
        if inner:
            values.setdefault(group, {})[inner[0]] = value
        else:
            values[group] = value
    return values


def first_refused_setting(
    model: type[BaseModel], error: ValidationError, places: Mapping[str, Place] | None = None
) -> RefusedSetting:
    """Return the first error that pydantic reports, with the path of the setting as given, or else its flat name."""
    refused = first_refused(error, model)
    place = tuple(refused.place)
    group = group_of(model.model_fields[place[0]]) if place and place[0] in model.model_fields else None
    if group is None:
        return refused
    if len(place) == 1:
        # The message of a validator of the whole group names the settings itself.
        missing = error.errors(include_url=False, include_context=False, include_input=False)[0]["type"] == "missing"
        return RefusedSetting(place if missing else (), refused.reason)
    flat = flat_name(place[1], group.model_fields[place[1]]) if place[1] in group.model_fields else place[1]
    return RefusedSetting((*(places or {}).get(flat, (flat,)), *place[2:]), refused.reason)


def _info(field: FieldInfo, name: str, place: tuple[str, ...], elsewhere: Mapping[str, Affects]) -> SettingInfo:
    if not is_annotated(field):
        if name not in elsewhere:
            raise TypeError(f"The setting {'.'.join(place)} does not declare what it affects; define it by setting().")
        return SettingInfo(name, place, field, elsewhere[name], name, False)
    annotation: Any = field.json_schema_extra
    given = annotation[_KEY]
    flat = given["flat"] or name
    record = given["recorded"]
    return SettingInfo(
        flat,
        place,
        field,
        given["affects"],
        record if isinstance(record, str) else flat if record else None,
        given["swept"],
        given["recorded_default"],
    )


def _flat_names(model: type[BaseModel]) -> dict[str, tuple[str, ...]]:
    names: dict[str, tuple[str, ...]] = {}
    for name, field in model.model_fields.items():
        group = group_of(field)
        if group is None:
            names[name] = (name,)
        else:
            names |= {flat_name(inner, each): (name, inner) for inner, each in group.model_fields.items()}
    return names


def _flat_in(group: type[SettingGroup], name: str, inner: Any, known: Mapping[str, tuple[str, ...]]) -> str:
    if inner in group.model_fields:
        return flat_name(inner, group.model_fields[inner])
    if known.get(inner, ("",))[0] == name:
        return str(inner)
    own = list(group.model_fields)
    reason = unknown_name(inner, own)
    elsewhere = get_close_matches(str(inner), known, n=1)
    if elsewhere and not get_close_matches(str(inner), own, n=1):
        reason = f"there is no setting {inner}; did you mean {'.'.join(known[elsewhere[0]])}?"
    raise RefusedSetting((name, inner), f"in {name} {reason}")
