"""Guess the tuners of a request from its body, to route it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

_TAG = re.compile(r"<(?:lora|lyco):([^<>:]*)", re.IGNORECASE)


def wanted_tuners(body: bytes) -> list[str]:
    """Return the names of tuners that a body of JSON seems to want; a wrong guess only costs time."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        return []
    if not isinstance(values, Mapping):
        return []
    names = [part.partition(":")[0] for part in str(values.get("model") or "").split("+")]
    listed = values.get("tuners")
    names += (
        [str(each.get("name")) for each in listed if isinstance(each, Mapping)] if isinstance(listed, list) else []
    )
    names += _TAG.findall(str(values.get("prompt") or ""))
    return sorted({name for name in names if name and len(name) < 200})[:8]
