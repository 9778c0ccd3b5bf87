"""Registry of tuner families: the config, the part and the summary of each, by name.

A family of another package registers itself when its module is imported. An entry point of the group
`restune_diffusion.tuner_families` names that module, which is imported at the first lookup of any family. This module
does not import torch, so that a command line can show its help quickly.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from threading import Event, RLock
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import from_json

from ..utils.display import printable
from ..utils.errors import RestuneError, UnknownFamilyError
from ..utils.expected import Expected
from ..utils.settings import SettingsType, unwrap_help_texts
from ..utils.settings_merge import first_refused

if TYPE_CHECKING:
    from ..backbones import BaseInfo
    from .base import Part

ENTRY_POINTS = "restune_diffusion.tuner_families"
"""Group of entry points that name the modules of tuner families in other packages."""

PartClass = TypeVar("PartClass", bound="type[Part]")

# The name of a family is also the name of a setting, a flag and a module, and the first part of tensor keys.
_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}", re.ASCII)


class PartConfig(BaseModel, metaclass=SettingsType):
    """Base class of the settings of a part, which the tuner's file stores as JSON.

    A subclass declares `part: Literal["<name>"] = "<name>"`, where `<name>` is the name of the family, and settings
    with defaults.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        unwrap_help_texts(cls)

    writes_at_out_alone: ClassVar[bool] = False
    """Whether the part writes only at `out`, the input of the output head, and reads only its taps and the time
    embedding. No gradient enters the base's blocks then, so that training can share forward passes of the base, or
    read the base's features from a feature cache."""
    acts_on_text_encoders: ClassVar[bool] = False
    """Whether the part acts on text encoders. Captions are then encoded again in each training step, and the part
    class is a `TextPart`."""

    only_initial: ClassVar[frozenset[str]] = frozenset()
    """Settings that affect only the initial parameters, so that training from a tuner file may differ in them."""

    part: str = ""
    """Name of the family; the default is the only allowed value."""

    @property
    def new_words(self) -> tuple[str, ...]:
        """Placeholder tokens of the part; captions must contain them, and the tuner's file records them."""
        return ()


ConditionName: TypeAlias = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"),
    Expected("names of letters, digits, `_` and `-`"),
]


class ConditionedConfig(PartConfig):
    """Base class of the settings of a part that takes condition images.

    The part class has the attributes `conditions` and `channels`, and implements `Part.encode`.
    """

    conditions: tuple[ConditionName, ...] = Field(default=("condition",), min_length=1, max_length=16)
    """Names of the conditions, in the order of their condition images."""
    channels: int = Field(default=3, gt=0, le=64)
    """Number of channels of the condition images."""

    @model_validator(mode="after")
    def _names_differ(self) -> ConditionedConfig:
        if len(set(self.conditions)) != len(self.conditions):
            raise ValueError(f"conditions = {' '.join(self.conditions)} are not unique; rename the duplicates")
        return self


@dataclass(frozen=True)
class TunerFamily:
    """Registered tuner family.

    Args:
        name: name of the family, of its parts in files, and of its settings.
        config: class of the family's settings.
        summary: one-line description for help and documentation.
        source: part class, or its location as `module:Class`.
    """

    name: str
    config: type[PartConfig]
    summary: str
    source: type[Part] | str

    @property
    def part(self) -> type[Part]:
        """Part class of the family; imported on first use if the family is registered lazily."""
        if not isinstance(self.source, str):
            return self.source
        module, _, name = self.source.partition(":")
        found: type[Part] = getattr(import_module(module), name)
        return found

    def build(self, config: PartConfig, base: BaseInfo) -> Part:
        """Build a part from a config for the structure of a base.

        Raises:
            RestuneError: if the config belongs to another family, or does not fit the base.
        """
        if not isinstance(config, self.config):
            raise RestuneError(
                f"The part `{self.name}` takes a {self.config.__qualname__} of {self.config.__module__}, but got a "
                f"{type(config).__qualname__} of {type(config).__module__}."
            )
        return self.part(config, base)  # type: ignore[call-arg]


_FAMILIES: dict[str, TunerFamily] = {}
_LOCK = RLock()
_LOADING, _ALL_LOADED = Event(), Event()


def register_tuner_family(config: type[PartConfig], *, summary: str) -> Callable[[PartClass], PartClass]:
    """Register the decorated `Part` class as a tuner family.

    Args:
        config: class of the family's settings; the default of its field `part` is the family's name.
        summary: one-line description, shown by `restune train --help` and the documentation.

    Returns:
        The decorator. The part class is called as `Part(config, base)`, with a `BaseInfo`.

    Raises:
        RestuneError: if the name is invalid or taken, a setting has no default, or the summary is not one line.
    """

    def register(part: PartClass) -> PartClass:
        _add(config, summary, part)
        return part

    return register


def register_lazy_tuner_family(config: type[PartConfig], part: str, *, summary: str) -> None:
    """Register a tuner family whose part class is imported when the first part is built.

    Args:
        config: see `register_tuner_family`.
        part: location of the part class, `module:Class`.
        summary: see `register_tuner_family`.

    Raises:
        RestuneError: see `register_tuner_family`.
    """
    _add(config, summary, part)


def unregister_tuner_family(name: str) -> None:
    """Remove a family from the registry.

    Raises:
        UnknownFamilyError: if no family has this name.
    """
    with _LOCK:
        del _FAMILIES[tuner_family(name).name]


def tuner_family(name: str) -> TunerFamily:
    """Return the family with a name.

    Raises:
        UnknownFamilyError: if no family has this name; the message lists the registered names.
    """
    _load_entry_points()
    try:
        return _FAMILIES[name]
    except KeyError:
        raise UnknownFamilyError(
            f"There is no tuner family `{printable(str(name), 40)}`, only {', '.join(_FAMILIES)}; install the package "
            f"that provides it, or upgrade restune-diffusion."
        ) from None


def tuner_families() -> tuple[TunerFamily, ...]:
    """Return all families, the built-in ones first."""
    _load_entry_points()
    return tuple(_FAMILIES.values())


def _add(config: type[PartConfig], summary: str, source: type[Part] | str) -> None:
    if not (isinstance(config, type) and issubclass(config, PartConfig)):
        raise RestuneError(f"The config of a tuner family is a subclass of PartConfig, but got {config!r}.")
    name = config.model_fields["part"].default
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RestuneError(
            f'{config.__qualname__} has the part name {name!r}; declare `part: Literal["name"] = "name"` with a name '
            f"of up to 32 lower-case letters, digits and underscores that starts with a letter."
        )
    needed = [field for field, info in config.model_fields.items() if info.is_required()]
    if needed:
        raise RestuneError(
            f"The settings of the tuner family `{name}` need defaults, but {', '.join(needed)} has none."
        )
    if not summary.strip() or not summary.isprintable():
        raise RestuneError(f"The summary of the tuner family `{name}` is one line of text, but got {summary!r}.")
    with _LOCK:
        if name in _FAMILIES:
            taken = _FAMILIES[name].config
            raise RestuneError(
                f"The tuner family `{name}` is registered already, with {taken.__qualname__} of {taken.__module__}; "
                f"choose another name."
            )
        _FAMILIES[name] = TunerFamily(name, config, summary, source)


def _load_entry_points() -> None:
    """Import the modules of families in other packages, once per process."""
    if _ALL_LOADED.is_set():
        return
    # Other threads wait here until all families are registered; the imported modules may look up families.
    with _LOCK:
        if _LOADING.is_set():
            return
        _LOADING.set()
        for found in entry_points(group=ENTRY_POINTS):
            try:
                found.load()
            except Exception as error:
                package = found.dist.name if found.dist is not None else found.value
                warnings.warn(
                    f"The package {package} provides the tuner family `{found.name}`, but it cannot be loaded "
                    f"({type(error).__name__}: {error}); upgrade or uninstall the package.",
                    stacklevel=4,
                )
        _ALL_LOADED.set()


def parts_to_json(parts: Iterable[PartConfig]) -> str:
    """Return part configs as a JSON list."""
    return f"[{','.join(part.model_dump_json() for part in parts)}]"


def parts_from_json(text: str) -> tuple[PartConfig, ...]:
    """Read part configs from JSON.

    Raises:
        UnknownFamilyError: if the family of a part is not registered.
        RestuneError: if the text is not a valid list of part configs; the message describes the first error.
    """
    try:
        values = from_json(text)
    except ValueError as error:
        raise _invalid("the list", f"Invalid JSON: {error}") from error
    if not isinstance(values, list):
        raise _invalid("the list", "it is not a list")
    return tuple(_part_from_json(number, value) for number, value in enumerate(values))


def _part_from_json(number: int, value: Any) -> PartConfig:
    name = value.get("part") if isinstance(value, dict) else None
    if not isinstance(name, str):
        raise _invalid(str(number), "it is not an object that names its `part`")
    try:
        return tuner_family(name).config.model_validate(value)
    except ValidationError as error:
        first = first_refused(error, tuner_family(name).config)
        raise _invalid(".".join(map(str, (number, name, *first.place))), first.reason) from error


def _invalid(place: str, reason: str) -> RestuneError:
    return RestuneError(f"The tuner config is not valid at {place}: {reason}.")
