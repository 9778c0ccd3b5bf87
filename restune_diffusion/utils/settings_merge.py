"""Merge settings from preset, YAML file and command line, in increasing precedence, and check single fields."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from .expected import NOT_VALID, not_valid

Place: TypeAlias = tuple[Any, ...]
"""Path of a setting: the names of its groups, its own name, and indices into its value."""


class RefusedSetting(ValueError):
    """Invalid setting, with its path and the reason."""

    def __init__(self, place: Place, reason: str) -> None:
        super().__init__(reason)
        self.place = place
        self.reason = reason

    def sentence(self) -> str:
        """Return the reason after the name of the setting, unless it names the setting itself."""
        name = ".".join(map(str, self.place))
        return self.reason if not name or names_setting(self.reason, self.place[-1]) else f"{name}: {self.reason}"


def names_setting(reason: str, name: object) -> bool:
    """Return whether a reason names the setting itself; that of an invalid value never does."""
    return NOT_VALID not in reason and str(name) in re.findall(r"[\w-]+", reason)


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested settings; later layers take precedence, groups are merged and lists replaced."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = result.get(key)
            merge = isinstance(below, Mapping) and isinstance(value, Mapping)
            result[key] = layered(below, value) if merge else value  # type: ignore[arg-type]
    return result


def flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Flatten nested settings to pairs of name and value; a setting in a group is named `group.name`."""
    items: list[tuple[str, Any]] = []
    for name, value in settings.items():
        items += flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return items


def first_unknown(model: type[BaseModel], values: Mapping[Any, Any]) -> tuple[Place, str] | None:
    """Return path and error message of the first name that is not a field of the model or of a group in it."""
    for name, value in values.items():
        if name not in model.model_fields:
            return (name,), unknown_name(name, model.model_fields)
        group = model.model_fields[name].annotation
        if isinstance(group, type) and issubclass(group, BaseModel) and isinstance(value, Mapping):
            found = first_unknown(group, value)
            if found is not None:
                place, message = found
                return (name, *place), f"in {name} {message}"
    return None


def checked_fields(fields: Mapping[str, FieldInfo], values: Mapping[str, Any]) -> dict[str, Any]:
    """Validate settings one by one, each by its own field, and return their values in the fields' types.

    Raises:
        RefusedSetting: for the first invalid value.
    """
    checked = {}
    for name, value in values.items():
        field = fields[name]
        adapter: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]
        try:
            checked[name] = adapter.validate_python(value)
        except ValidationError as error:
            refused = first_refused(error, field)
            raise RefusedSetting((name, *refused.place), refused.reason) from error
    return checked


def first_refused(error: ValidationError, model: type[BaseModel] | FieldInfo | None = None) -> RefusedSetting:
    """Return the first error that pydantic reports, with the value and what its setting allows.

    Args:
        error: the error.
        model: model or field that was validated; without it, the reason is the message of a validator.
    """
    first = error.errors(include_url=False, include_context=False)[0]
    place = first["loc"]
    if first["type"] == "extra_forbidden":
        return RefusedSetting(place, "there is no such setting")
    field, depth = _field_at(model, place)
    if first["type"] == "missing" and depth >= len(place) - (field is None):
        return RefusedSetting(place, "this setting is required")
    if first["type"] == "value_error" or field is None:
        reason = first["msg"].removeprefix("Value error, ").rstrip(".")
        return RefusedSetting(place, f"{reason[0].lower()}{reason[1:]}")
    # Further parts are the alternatives of a type, which a person does not know.
    if first["type"] == "missing":
        place = place[:depth]
    kept = next((end for end in range(depth, len(place)) if not isinstance(place[end], int)), len(place))
    return RefusedSetting(place[:kept], not_valid(first["input"], field))


def _field_at(model: type[BaseModel] | FieldInfo | None, place: Place) -> tuple[FieldInfo | None, int]:
    """Return the innermost field on a path, and the number of parts of the path that lead to it."""
    found, depth = (model, 0) if isinstance(model, FieldInfo) else (None, 0)
    inside = model.annotation if isinstance(model, FieldInfo) else model
    for name in place:
        fields = inside.model_fields if isinstance(inside, type) and issubclass(inside, BaseModel) else {}
        if name not in fields:
            break
        found, depth = fields[name], depth + 1
        inside = found.annotation
    return found, depth


def unknown_name(name: object, known: Collection[str]) -> str:
    """Return an error message for a name that is not among the valid ones, with the closest valid name."""
    near = get_close_matches(str(name), known, n=1)
    if near:
        hint = f"did you mean {near[0]}?"
    else:
        listed = ", ".join(known)
        hint = f"valid names are {listed}" if len(known) <= _LISTED else "restune train --help lists them all"
    return f"there is no setting {name}; {hint}"


# Longest list of names in an error message.
_LISTED = 20
