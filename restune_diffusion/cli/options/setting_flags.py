"""Flags for grouped settings: flat names, a section of `--help` for each group, and old names of flags."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import tyro
from pydantic import BaseModel, ValidationError, create_model

from ...training.config.renamed import RENAMED, RenamedSettingWarning, sentence
from ...utils.errors import UsageError
from ...utils.setting_groups import SettingGroup, first_refused_setting, flat_name, group_of

Model = TypeVar("Model", bound=BaseModel)


def with_flat_flags(model: type[Model]) -> type[Model]:
    """Return a model for tyro whose grouped settings have flat flags, such as `--learning-rate`."""
    groups: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        group = group_of(field)
        if group is not None:
            flags = _group_flags(group)
            groups[name] = (flags, ... if field.is_required() else flags())
    return create_model(model.__name__, __base__=model, __module__=model.__module__, **groups)


def unchecked(model: type[Model], values: dict[str, Any]) -> Model:
    """Return an unvalidated instance of such a model, as default for tyro."""
    values = dict(values)
    for name, field in model.model_fields.items():
        group = group_of(field)
        if group is not None:
            values[name] = group.model_construct(**values.get(name, {}))
    return model.model_construct(**values)


def current_flags(args: Sequence[str]) -> list[str]:
    """Return arguments with old flag names replaced by the current ones; print each old name to stderr."""
    new_names = {_flag(old): _flag(new) for old, new in RENAMED.items()}
    result = []
    for argument in args:
        flag, equals, value = argument.partition("=")
        new = new_names.get(flag.replace("_", "-"))
        if new is not None:
            print(f"restune: {sentence(flag, new)}.", file=sys.stderr)
        result.append(f"{new}{equals}{value}" if new is not None else argument)
    return result


@contextmanager
def old_names_on_stderr() -> Iterator[None]:
    """Context manager that prints warnings about old setting names to stderr, where Python would hide them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RenamedSettingWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, RenamedSettingWarning):
            print(f"restune: {warning.message}.", file=sys.stderr)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _group_flags(group: type[SettingGroup]) -> type[SettingGroup]:
    def check(self: SettingGroup, **values: Any) -> None:
        try:
            super(flags, self).__init__(**values)
        except ValidationError as error:
            # Not a ValueError, which tyro would show in a box.
            raise UsageError(f"{first_refused_setting(group, error).sentence()}.") from error

    fields: dict[str, Any] = {}
    for name, field in group.model_fields.items():
        flag = tyro.conf.arg(name=flat_name(name, field).replace("_", "-"), prefix_name=False)
        fields[name] = (Annotated[field.annotation, flag], copy.copy(field))
    flags = create_model(group.__name__, __base__=group, __module__=group.__module__, __doc__=group.__doc__, **fields)
    flags.__init__ = check  # type: ignore[method-assign,assignment]
    return flags


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
