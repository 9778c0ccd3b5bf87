"""Settings from several places: a preset, a file, flags; the later ones win, name by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

Place: TypeAlias = tuple[Any, ...]
"""Where a setting is: the names of the groups that hold it, its own, and indices into its value."""


class RefusedSetting(ValueError):
    """A setting that is not allowed, and its place."""

    def __init__(self, place: Place, reason: str) -> None:
        super().__init__(reason)
        self.place = place
        self.reason = reason


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings in which each layer wins over those before it: groups are merged, lists replaced."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = result.get(key)
            merge = isinstance(below, Mapping) and isinstance(value, Mapping)
            result[key] = layered(below, value) if merge else value  # type: ignore[arg-type]
    return result


def flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return nested settings one by one, those of a group under `group.name`."""
    items: list[tuple[str, Any]] = []
    for name, value in settings.items():
        items += flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return items


def first_unknown(model: type[BaseModel], values: Mapping[Any, Any]) -> tuple[Place, str] | None:
    """Return the place of the first name that a model or a group in it does not know, and a sentence about it."""
    for name, value in values.items():
        if name not in model.model_fields:
            return (name,), unknown_name(name, model.model_fields)
        group = model.model_fields[name].annotation
        if isinstance(group, type) and issubclass(group, BaseModel) and isinstance(value, Mapping):
            found = first_unknown(group, value)
            if found is not None:
                place, sentence = found
                return (name, *place), f"in {name} {sentence}"
    return None


def checked_fields(fields: Mapping[str, FieldInfo], values: Mapping[str, Any]) -> dict[str, Any]:
    """Check some settings, each by its own field, and return them in the fields' types.

    Raises:
        RefusedSetting: for the first that is not allowed.
    """
    checked = {}
    for name, value in values.items():
        field = fields[name]
        adapter: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]
        try:
            checked[name] = adapter.validate_python(value)
        except ValidationError as error:
            refused = first_refused(error)
            raise RefusedSetting((name, *refused.place), refused.reason) from error
    return checked


def first_refused(error: ValidationError) -> RefusedSetting:
    """Return the first thing that pydantic refuses."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    reason = _REASONS.get(first["type"]) or first["msg"].removeprefix("Value error, ").rstrip(".")
    return RefusedSetting(first["loc"], f"{reason[0].lower()}{reason[1:]}")


def unknown_name(name: object, known: Collection[str]) -> str:
    """Return a sentence about a name that is not among the known ones, with the nearest of them."""
    near = get_close_matches(str(name), known, n=1)
    if near:
        meant = f"did you mean {near[0]}?"
    else:
        meant = f"there are {', '.join(known)}" if len(known) <= _LISTED else "restune train --help lists them all"
    return f"there is no setting {name}; {meant}"


# A person reads so many names.
_LISTED = 20
# What pydantic says in words of Python.
_REASONS = {
    "missing": "this setting is needed",
    "tuple_type": "it should be a list",
    "string_type": "it should be text; put it in quotes",
    "model_type": "it is a group of settings, each with a name",
}
