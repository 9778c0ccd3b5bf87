"""Precedence of `steps` and `epochs` from several sources: one of them replaces the other of a lower source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LENGTHS = ("steps", "epochs")


def without_replaced_length(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without `steps` and `epochs`, if settings that take precedence name either of them."""
    replaced = any(above.get(name) is not None for name in LENGTHS)
    return {name: value for name, value in below.items() if not (replaced and name in LENGTHS)}
