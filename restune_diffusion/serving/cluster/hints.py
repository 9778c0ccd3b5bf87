"""Guess the tuners of a request from its body, to route it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

_FIELD = re.compile(rb'name="(model|tuners\[\]\[name\])"\r?\n\r?\n([^\r\n]{1,400})\r?\n')
_HEAD = 65_536
"""Bytes of a form in which its text fields are looked for, from the start and from the end."""
_TAG = re.compile(r"<(?:lora|lyco):([^<>:]*)", re.IGNORECASE)


def wanted_tuners(body: bytes) -> list[str]:
    """Return the names of tuners that a body of JSON or a form seems to want; a wrong guess only costs time."""
    if body.startswith(b"--"):
        return _distinct(name for _, value in _fields(body) for name in _of_model(value))
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        return []
    if not isinstance(values, Mapping):
        return []
    names = _of_model(str(values.get("model") or ""))
    listed = values.get("tuners")
    if isinstance(listed, list):
        names += [str(each.get("name")) for each in listed if isinstance(each, Mapping)]
    return _distinct([*names, *_TAG.findall(str(values.get("prompt") or ""))])


def _fields(body: bytes) -> list[tuple[str, str]]:
    """Return the fields of a form that name tuners."""
    parts = [body] if len(body) <= 2 * _HEAD else [body[:_HEAD], body[-_HEAD:]]
    found = [match for part in parts for match in _FIELD.findall(part)]
    return [(name.decode(), value.decode("utf-8", "replace")) for name, value in found]


def _of_model(model: str) -> list[str]:
    return [part.partition(":")[0] for part in model.split("+")]


def _distinct(names: Iterable[str]) -> list[str]:
    return sorted({name for name in names if name and len(name) < 200})[:8]
