"""Description of the values that a field of a model allows, in place of pydantic's messages."""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .display import printable

NOT_VALID = "is not valid"
_LONGEST = 80
_COUNTS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True)
class Expected:
    """Description of the values of an annotated type, in its metadata, if the type does not tell it."""

    text: str


def not_valid(value: object, field: FieldInfo) -> str:
    """Return why a value is refused: the value, and what the field allows."""
    return f"{shown(value)} {NOT_VALID}; use {expected(field)}"


def shown(value: object) -> str:
    """Return a value as a setting has it in a message: short, and on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value) if isinstance(value, str | int | float | PurePath) and str(value).strip() else repr(value)
    return printable(text, _LONGEST)


def expected(field: FieldInfo) -> str:
    """Return a description of the values that a field allows, such as `a whole number above 0`."""
    annotations = field.json_schema_extra.values() if isinstance(field.json_schema_extra, dict) else ()
    own = [each["expected"] for each in annotations if isinstance(each, dict) and each.get("expected")]
    return str(own[0]) if own else _described(field.annotation, field.metadata)


def _described(annotation: Any, metadata: Sequence[Any], *, many: bool = False) -> str:
    if own := [each.text for each in metadata if isinstance(each, Expected)]:
        return own[0]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _described(arguments[0], [*arguments[1:], *metadata], many=many)
    if origin in (Union, types.UnionType):
        kinds = [each for each in arguments if each is not type(None)]
        lists = [each for each in kinds if get_origin(each) is tuple and get_args(each)[0] in kinds]
        if lists and len(kinds) == 2:
            return f"one or several of {_described(get_args(lists[0])[0], metadata)}"
        return " or ".join(dict.fromkeys(_described(each, metadata, many=many) for each in kinds))
    if origin is Literal:
        names = [str(each) for each in arguments]
        return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
    if origin is tuple or annotation is tuple:
        return _list(arguments)
    if annotation is bool:
        return "true or false"
    if annotation in (int, float):
        noun = "whole number" if annotation is int else "number"
        return f"{noun}s" if many else f"a {noun}{_range(metadata)}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a group of named settings"
    if isinstance(annotation, type) and issubclass(annotation, PurePath):
        return "paths" if many else "a path"
    pattern = next((each.pattern for each in metadata if getattr(each, "pattern", None)), None)
    if pattern is not None:
        return f"text of the form {getattr(pattern, 'pattern', pattern)}"
    return "texts" if many else "text in quotes"


def _list(arguments: Sequence[Any]) -> str:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return f"a list of {_described(arguments[0], (), many=True)}"
    return f"{_COUNTS.get(len(arguments), len(arguments))} {_described(arguments[0], (), many=True)}"


def _range(metadata: Sequence[Any]) -> str:
    bounds = {name: getattr(each, name) for each in metadata for name in ("gt", "ge", "lt", "le") if _has(each, name)}
    low = f"above {bounds['gt']:g}" if "gt" in bounds else f"from {bounds['ge']:g}" if "ge" in bounds else ""
    high = f"below {bounds['lt']:g}" if "lt" in bounds else f"{bounds['le']:g}" if "le" in bounds else ""
    if not high:
        return f" {low} upwards" if "ge" in bounds else f" {low}" if low else ""
    if "le" not in bounds:
        return f" {low} and {high}" if low else f" {high}"
    return f" {low} to {high}" if "ge" in bounds else f" {low}, up to {high}" if low else f" up to {high}"


def _has(constraint: Any, name: str) -> bool:
    return getattr(constraint, name, None) is not None


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return the alternatives of a type, without None."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(kind for each in get_args(annotation) if each is not type(None) for kind in alternatives(each))
    return (annotation,)
