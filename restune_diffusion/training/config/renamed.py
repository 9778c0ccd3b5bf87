"""Deprecated names of settings, accepted for one more release."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...utils.settings_merge import Place, RefusedSetting

RENAMED: Mapping[str, str] = {
    "feature_bank": "feature_cache",
    "feature_bank_dtype": "feature_cache_dtype",
    "feature_bank_dir": "feature_cache_dir",
    "validation.leak_prompts": "validation.drift_prompts",
}
"""New name of each old name; flags, YAML files and Python all use this table."""


class RenamedSettingWarning(DeprecationWarning):
    """Warning about the use of an old name of a setting."""


@dataclass(frozen=True)
class Renamed:
    """Settings under their new names; `given` maps the new place of a renamed setting to its old place."""

    values: dict[Any, Any]
    given: Mapping[Place, Place]


def sentence(old: str, new: str) -> str:
    """Return the deprecation message for an old name."""
    return f"{old} is now called {new}; the old name will be removed in the next release"


def warn(message: str) -> None:
    """Warn about an old name, with the stack level of the code that called this library."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_inside(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RenamedSettingWarning, stacklevel=level)


def renamed(values: Mapping[Any, Any], within: str = "", tell: Callable[[str, Place], None] | None = None) -> Renamed:
    """Return settings under their new names.

    Args:
        values: the settings, flat or in groups.
        within: prefix of the group that holds all of them, with a dot.
        tell: called with the message about an old name and its place; emits a warning by default.

    Raises:
        RefusedSetting: if a setting is given under both names.
    """
    result, given = dict(values), {}
    for old, new in RENAMED.items():
        if not old.startswith(within):
            continue
        *groups, name = old.removeprefix(within).split(".")
        new_name = new.rpartition(".")[2]
        holder = result
        for group in groups:
            inner = holder.get(group)
            if not isinstance(inner, Mapping):
                break
            holder[group] = dict(inner)
            holder = holder[group]
        else:
            if name not in holder:
                continue
            place = (*groups, name)
            if new_name in holder:
                raise RefusedSetting(place, f"{old} is the old name of {new}, which is given too; keep one")
            # Rebuilt in place to preserve the order of the settings.
            entries = [(new_name if key == name else key, value) for key, value in holder.items()]
            holder.clear()
            holder.update(entries)
            given[(*groups, new_name)] = place
            text = sentence(old, new)
            if tell is None:
                warn(text)
            else:
                tell(text, place)
    return Renamed(result, given)


def _is_inside(module: str) -> bool:
    return module.partition(".")[0] in {"restune_diffusion", "pydantic"}
