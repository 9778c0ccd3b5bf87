"""Read settings from YAML, with the line that each stands in; write them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .display import printable
from .errors import SettingsError
from .settings_merge import Place

# Far more than a person writes, and little for a parser.
_MOST_BYTES = 1 << 20
_MOST_LEVELS = 20


@dataclass(frozen=True)
class YamlFile:
    """The values of a YAML file, and the line of each, counted from 1."""

    path: Path
    values: dict[Any, Any]
    lines: dict[tuple[str, ...], int | None]

    def refused(self, place: Place, reason: str) -> SettingsError:
        """Return the error for what stands in a place, with its line."""
        # pydantic's places go on with the kinds of value that it tried; a merged key (`<<`) has no line of its own.
        place = tuple(map(str, place))
        known = next((place[:end] for end in range(len(place), 0, -1) if place[:end] in self.lines), place[:1])
        named = reason if not known or known[-1] in reason else f"{'.'.join(known)}: {reason}"
        return _error(self.path, named, self.lines.get(known))


def read_yaml(path: Path) -> YamlFile:
    """Read a file that holds one mapping, by PyYAML's safe loader.

    Raises:
        SettingsError: if it cannot be read, is no valid YAML, holds a name twice, or something other than a mapping.
    """
    text = _text(path)
    try:
        _check_depth(path, text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        lines = dict(_places(path, root, (), set())) if root is not None else {}
        values = yaml.safe_load(text)
    except SettingsError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = error.problem or error.context or "it cannot be parsed"
        if "'\\t'" in reason:
            reason = "a tab; indent with spaces"
        raise _error(path, f"this is not valid YAML: {reason}", _line(mark)) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise _error(path, f"this is not valid YAML: {str(error).splitlines()[0]}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise _error(path, "the file must hold settings as `name: value`, one a line")
    return YamlFile(path, values, lines)


def to_yaml(values: Mapping[str, Any]) -> str:
    """Write plain values as YAML, in their order."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=100)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(data) > _MOST_BYTES:
        raise SettingsError(f"{path} is larger than {_MOST_BYTES:,} bytes; settings are never that long.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise _error(path, "this is not UTF-8 text; save the file as UTF-8", line) from error


def _check_depth(path: Path, text: str) -> None:
    """Refuse what would exhaust the stack of the recursive steps; the events come without recursion."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_LEVELS:
            raise _error(path, f"settings are nested deeper than {_MOST_LEVELS} levels", _line(event.start_mark))


def _places(
    path: Path, node: yaml.Node, place: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], int | None]]:
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for number, child in enumerate(node.value):
            yield (*place, str(number)), _line(child.start_mark)
            yield from _places(path, child, (*place, str(number)), seen)
    if isinstance(node, yaml.MappingNode):
        found: dict[str, int | None] = {}
        for key, child in node.value:
            line = _line(key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                if key.value in found:
                    name = ".".join((*place, key.value))
                    raise _error(path, f"{name} stands here again, after line {found[key.value]}; keep one", line)
                found[key.value] = line
                yield (*place, key.value), line
                yield from _places(path, child, (*place, key.value), seen)


def _line(mark: Any) -> int | None:
    return mark.line + 1 if mark is not None else None


def _error(path: Path, reason: str, line: int | None = None) -> SettingsError:
    where = f"{path}, line {line}" if line is not None else f"{path}"
    return SettingsError(printable(f"{where}: {reason}", 1000))
