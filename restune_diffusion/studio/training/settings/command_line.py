"""Write training settings as the arguments of `restune train`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from ....utils.settings_merge import flat


def command_arguments(settings: Mapping[str, Any]) -> list[str]:
    """Return the arguments of `restune train` for settings by flat name.

    Args:
        settings: settings; those of a family or of the validation are a mapping.
    """
    arguments: list[str] = []
    for name, value in flat(settings):
        group, dot, field = name.replace("_", "-").rpartition(".")
        if isinstance(value, bool):
            arguments.append(f"--{group}{dot}{'' if value else 'no-'}{field}")
        elif isinstance(value, list | tuple):
            arguments += [f"--{group}{dot}{field}", *map(str, value)] if value else []
        else:
            arguments += [f"--{group}{dot}{field}", str(value)]
    return arguments


def command_line(settings: Mapping[str, Any]) -> str:
    """Return the command that trains with settings by flat name, quoted for a POSIX shell."""
    return shlex.join(["restune", "train", *command_arguments(settings)])
