"""Help of `restune train`: the most used flags first, then all others by what they are for."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ...training.config.presets import PRESETS
from ...training.config.train_config import current_settings
from ...tuners.registry import tuner_families
from ...utils.expected import alternatives
from .flag_check import Flag, flags_of

_MOST_USED = (
    *("base", "data", "output", "preset", "tuner", "steps", "epochs", "resolution", "batch-size", "learning-rate"),
    *("prompt", "trigger-word", "validation.prompts", "seed", "resume", "config"),
)
_SECTIONS: Mapping[str, Sequence[str]] = {
    "Base and data": ("vae", "data"),
    "Tuner": ("init_tuner", "control_data"),
    "Optimization": ("gradient_accumulation_steps", "optimizer", "caption_dropout", "sweep"),
    "Loss and noise": ("loss", "noise"),
    "Distillation": ("teacher",),
    "Preservation of the class": ("preservation",),
    "Precision and memory": ("memory", "feature_cache"),
    "Validation": ("validation",),
    "Output, checkpoints and logging": ("name", "checkpoints", "log_with"),
}
"""Sections, with the names of groups and of single settings."""
_FIRST = " " * 4
_INDENT = " " * 8
_WIDEST = 110


def help_page(prog: str, description: str, model: type[BaseModel], defaults: Mapping[str, Any]) -> str:
    """Return the help text.

    Args:
        prog: name of the program.
        description: text before the flags.
        model: class of the options.
        defaults: values of the settings by flat name, for those that differ from the default of their field.
    """
    flags = {name[2:]: flag for name, flag in flags_of(model) if not name.rpartition(".")[2].startswith("--no-")}
    flags = {name: flag for name, flag in flags.items() if not _is_hidden(name, flags)}
    lines = [
        f"usage: {prog} [--help] --base BASE --data FOLDER --output FOLDER [OPTIONS]",
        "",
        description.strip(),
        "",
    ]
    lines += _section("Most used", _MOST_USED, flags, defaults)
    lines += ["", "Presets", "-------"]
    lines += [line for name, preset in PRESETS.items() for line in _wrapped(f"{name}: {preset.describe()}", _FIRST)]
    shown = set(_MOST_USED)
    places = {name.replace("_", "-"): info.place[0] for name, info in current_settings().items()}
    families = {family.name: family.summary for family in tuner_families()}
    for title, groups in _SECTIONS.items():
        names = [name for name in flags if _group(name, places) in groups and name not in shown]
        lines += _section(title, names, flags, defaults)
        shown |= {*names}
        if title == "Tuner":
            for family, summary in families.items():
                names = [name for name in flags if name.startswith(f"{family}.")]
                lines += _section(f"Tuner `{family}`: {summary}", names, flags, defaults)
                shown |= {*names}
    return "\n".join([*lines, *_section("Other", [name for name in flags if name not in shown], flags, defaults)])


def _is_hidden(name: str, flags: Mapping[str, Flag]) -> bool:
    """Return whether a flag is the negation of another, or the constant name of a family."""
    group, _, own = name.rpartition(".")
    positive = f"{group}.{own[3:]}" if group else own[3:]
    return own == "part" or (own.startswith("no-") and positive in flags)


def _group(name: str, places: Mapping[str, str]) -> str:
    first = name.partition(".")[0]
    return places.get(name, places.get(first, first))


def _section(title: str, names: Iterable[str], flags: Mapping[str, Flag], defaults: Mapping[str, Any]) -> list[str]:
    entries = [line for name in names for line in _entry(name, flags[name].field, defaults)]
    return ["", title, "-" * min(len(title), _WIDEST), *entries] if entries else []


def _entry(name: str, field: FieldInfo, defaults: Mapping[str, Any]) -> list[str]:
    group, _, own = name.rpartition(".")
    default = _default(name, field, defaults)
    head = f"{_FIRST}--{name}"
    if alternatives(field.annotation) != (bool,):
        head += f" {_metavar(field.annotation)}"
    elif default == "default: on":
        head = f"{_FIRST}--{group}.no-{own}" if group else f"{_FIRST}--no-{own}"
    text = " ".join((field.description or "").split())
    # A text of the form "If not set, ..." tells the default itself.
    told = default == "default: none" and "If n" in text
    return [head, *_wrapped(text if told else f"{text} ({default})", _INDENT)]


def _wrapped(text: str, first: str) -> list[str]:
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    wrap = textwrap.TextWrapper(width, first, _INDENT, break_on_hyphens=False, break_long_words=False)
    return wrap.wrap(text)


def _default(name: str, field: FieldInfo, defaults: Mapping[str, Any]) -> str:
    flat = name.replace("-", "_")
    group, _, own = flat.rpartition(".")
    value: Any = defaults.get(flat)
    if value is None and group:
        inner = defaults.get(group)
        value = inner.get(own) if isinstance(inner, Mapping) else getattr(inner, own, None)
    if value is None:
        if field.is_required():
            return "required"
        value = field.get_default(call_default_factory=True)
    if value is None or value == ():
        return "default: none"
    if isinstance(value, bool):
        return f"default: {'on' if value else 'off'}"
    return f"default: {' '.join(map(str, value)) if isinstance(value, tuple | list) else value}"


def _metavar(annotation: Any) -> str:
    kinds = alternatives(annotation)
    single = [kind for kind in kinds if get_origin(kind) is not tuple]
    if len(single) < len(kinds):
        inner = get_args(next(kind for kind in kinds if get_origin(kind) is tuple))
        if inner[-1] is Ellipsis:
            return f"{_metavar(inner[0])} [...]"
        return " ".join(_metavar(each) for each in inner)
    (kind, *_) = kinds
    if get_origin(kind) is Annotated:
        return _metavar(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return f"{{{','.join(map(str, get_args(kind)))}}}"
    return {int: "N", float: "NUMBER", str: "TEXT"}.get(kind, "PATH")
