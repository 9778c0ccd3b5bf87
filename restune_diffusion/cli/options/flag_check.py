"""Check of a command line before tyro parses it, so that each mistake gives one sentence."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, get_args, get_origin

import tyro
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from ...utils.errors import UsageError
from ...utils.expected import NOT_VALID, alternatives, expected, not_valid
from ...utils.settings_merge import first_refused
from .short_names import name_here

_NUMBER = re.compile(r"-(\d|\.\d|inf)")


_ANSWERS = ("true", "false", "yes", "no", "1", "0")


@dataclass(frozen=True)
class Flag:
    """Flag of a command: its field, and whether it takes no, one or several values."""

    field: FieldInfo

    @property
    def is_switch(self) -> bool:
        """Whether the flag takes no value."""
        return alternatives(self.field.annotation) == (bool,)

    @property
    def takes_several(self) -> bool:
        """Whether the flag takes any number of values."""
        return any(get_origin(each) is tuple for each in alternatives(self.field.annotation))

    def check(self, name: str, values: Sequence[str]) -> None:
        """Raise `UsageError` if the values are not allowed."""
        if not values and not self.takes_several:
            raise UsageError(f"{name} needs a value; use {expected(self.field)}.")
        if type(None) in get_args(self.field.annotation) and list(values) == ["None"]:
            return
        several = [get_origin(each) is tuple for each in alternatives(self.field.annotation)]
        given: Any = values[0] if len(values) == 1 and not all(several) else tuple(values)
        adapter: TypeAdapter[Any] = TypeAdapter(Annotated[self.field.annotation, self.field])  # type: ignore[arg-type]
        try:
            result = adapter.validate_python(given)
        except ValidationError as error:
            reason = first_refused(error, self.field).reason
            raise UsageError(f"{name} {reason}." if NOT_VALID in reason else f"{name}: {reason}.") from error
        whole = isinstance(result, int) and float not in alternatives(self.field.annotation)
        if whole and not re.fullmatch(r"[+-]?\d+", str(given).strip()):
            # pydantic takes 3.0 for a whole number, and tyro does not.
            raise UsageError(f"{name} {not_valid(given, self.field)}.")


def check_flags(command: str, model: type[BaseModel], arguments: Sequence[str], present: Collection[str] = ()) -> None:
    """Check names and values of the flags of a command line; what is in order is left to tyro.

    Args:
        command: name of the command.
        model: class of its options.
        arguments: the arguments after the name of the command.
        present: names of required options that have a value from elsewhere, such as a file of settings.

    Raises:
        UsageError: if a flag is unknown, lacks its value, has an invalid one, or is required and missing.
    """
    if {"-h", "--help"} & {*arguments}:
        return
    flags = dict(flags_of(model))
    given: set[str] = set()
    places = 0
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not _is_flag(name):
            places += 1
            continue
        flag = flags.get(name.replace("_", "-"))
        if flag is None:
            raise UsageError(_unknown(command, name, flags))
        given.add(name.replace("_", "-"))
        if flag.is_switch:
            if equals or (rest and rest[0].lower() in _ANSWERS):
                raise UsageError(f"{name} takes no value, but {value or rest[0]} is given; leave it out.")
            continue
        values = [value] if equals else []
        while not equals and rest and not _is_flag(rest[0]) and (flag.takes_several or not values):
            values.append(rest.pop(0))
        flag.check(name, values)
    given |= {f"--{name}" for name in present}
    required = [name for name, flag in flags.items() if flag.field.is_required() and not flag.is_switch]
    if missing := [name for name in required if name not in given]:
        raise UsageError(f"{listed(missing)} {'is' if len(missing) == 1 else 'are'} required.")
    arguments_of = [(name, field) for name, field in model.model_fields.items() if _is_positional(field)]
    needed = [name for name, field in arguments_of if field.is_required()]
    if places < len(needed):
        plural = "s" if len(needed) > 1 else ""
        verb = "are" if plural else "is"
        raise UsageError(f"The argument{plural} {listed([name.upper() for name in needed])} {verb} required.")


def listed(names: Sequence[str]) -> str:
    """Return names as they are listed in a sentence."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _unknown(command: str, name: str, flags: Mapping[str, Flag]) -> str:
    ours = name_here(command, name.lstrip("-").replace("_", "-"))
    if ours is not None:
        return f"{name} is not an option of restune {command}; give {ours}."
    near = get_close_matches(name.replace("_", "-"), flags, n=1, cutoff=0.7)
    hint = f"did you mean {near[0]}?" if near else f"restune {command} --help lists all options."
    return f"{name} is not an option of restune {command}; {hint}"


def flags_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Flag]]:
    """Yield the flags of a command with their names, also those that turn a switch off."""
    for name, field in model.model_fields.items():
        if _is_positional(field):
            continue
        settings = [each for each in field.metadata if hasattr(each, "prefix_name")]
        flag = next((each.name for each in settings if each.name), name).replace("_", "-")
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from flags_of(inner, f"{prefix}{flag}.")
            continue
        bare = any(each.prefix_name is False for each in settings)
        yield f"--{'' if bare else prefix}{flag}", Flag(field)
        if Flag(field).is_switch:
            yield f"--{'' if bare else prefix}no-{flag}", Flag(field)


def _is_positional(field: FieldInfo) -> bool:
    return tyro.conf.Positional in field.metadata


def _is_flag(argument: str) -> bool:
    return argument.startswith("-") and len(argument) > 1 and not _NUMBER.match(argument) and " " not in argument
