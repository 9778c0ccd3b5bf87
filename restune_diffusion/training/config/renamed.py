"""Old names of settings, which are read for one more release."""

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
"""New names by old ones; flags, YAML files and Python all read this table."""


class RenamedSettingWarning(DeprecationWarning):
    """An old name of a setting was used."""


@dataclass(frozen=True)
class Renamed:
    """Settings under their new names; `given` has the place in which one was given under its old name."""

    values: dict[Any, Any]
    given: Mapping[Place, Place]


def sentence(old: str, new: str) -> str:
    """Return what to say about an old name."""
    return f"{old} is now called {new}; the old name goes with the next release"


def warn(message: str) -> None:
    """Warn of an old name, in the code that called this library."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_inside(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RenamedSettingWarning, stacklevel=level)


def renamed(values: Mapping[Any, Any], within: str = "", tell: Callable[[str, Place], None] | None = None) -> Renamed:
    """Return settings under their new names.

    Args:
        values: the settings, flat, or in groups.
        within: the group that they are all of, with a dot.
        tell: takes the sentence about an old name and its place; warns by default.

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
            # In the same position, so that the order of the settings stays.
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
