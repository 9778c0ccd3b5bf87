"""Read settings from YAML with the line number of each, and write them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .display import printable
from .errors import SettingsError
from .settings_merge import Place, names_setting

# Far more than a handwritten file has, and little for a parser.
_MOST_BYTES = 1 << 20
_MOST_LEVELS = 20


@dataclass(frozen=True)
class YamlFile:
    """Values of a YAML file, with the line number of each, counted from 1."""

    path: Path
    values: dict[Any, Any]
    lines: dict[tuple[str, ...], int | None]

    def refused(self, place: Place, reason: str) -> SettingsError:
        """Return the error for the setting at a path, with its line number."""
        # pydantic appends the types that it tried to the path; a merged key (`<<`) has no line of its own.
        place = tuple(map(str, place))
        known = next((place[:end] for end in range(len(place), 0, -1) if place[:end] in self.lines), place[:1])
        named = reason if not known or names_setting(reason, known[-1]) else f"{'.'.join(known)}: {reason}"
        return _error(self.path, named, self.lines.get(known))


def read_yaml(path: Path) -> YamlFile:
    """Read a file with one top-level mapping, using PyYAML's safe loader.

    Raises:
        SettingsError: if the file cannot be read, is not valid YAML, has a duplicate name, or is not a mapping.
    """
    return parse_yaml(_text(path), path)


def parse_yaml(text: str, path: Path) -> YamlFile:
    """Read a text with one top-level mapping, using PyYAML's safe loader.

    Args:
        text: the text.
        path: its file, or a name for error messages.

    Raises:
        SettingsError: if it is too long, not valid YAML, has a duplicate name, or is not a mapping.
    """
    if len(text) > _MOST_BYTES:
        raise SettingsError(f"{path} is larger than {_MOST_BYTES:,} bytes, the limit for a settings file.")
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
            reason = "tab character; indent with spaces"
        raise _error(path, f"this is not valid YAML: {reason}", _line(mark)) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise _error(path, f"this is not valid YAML: {str(error).splitlines()[0]}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise _error(path, "the file must contain settings as `name: value`, one per line")
    return YamlFile(path, values, lines)


def to_yaml(values: Mapping[str, Any]) -> str:
    """Convert plain values to YAML, in their order."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=100)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(data) > _MOST_BYTES:
        raise SettingsError(f"{path} is larger than {_MOST_BYTES:,} bytes, the limit for a settings file.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise _error(path, "this is not UTF-8 text; save the file as UTF-8", line) from error


def _check_depth(path: Path, text: str) -> None:
    """Reject nesting that would exhaust the stack of the recursive steps; YAML events need no recursion."""
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
                    raise _error(
                        path, f"duplicate setting {name}, first set in line {found[key.value]}; keep one", line
                    )
                found[key.value] = line
                yield (*place, key.value), line
                yield from _places(path, child, (*place, key.value), seen)


def _line(mark: Any) -> int | None:
    return mark.line + 1 if mark is not None else None


def _error(path: Path, reason: str, line: int | None = None) -> SettingsError:
    where = f"{path}, line {line}" if line is not None else f"{path}"
    return SettingsError(printable(f"{where}: {reason}", 1000))
