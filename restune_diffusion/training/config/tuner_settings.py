"""Settings of the registered tuner families in `TrainConfig`.

`TrainConfig` declares the settings of the built-in families as fields. The settings of families of other packages are
extra values of the config, validated here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import AfterValidator, BaseModel, Field, create_model

from ...tuners.registry import TunerFamily, tuner_families
from ...utils.errors import SettingsError
from ...utils.expected import shown
from ...utils.settings_merge import first_unknown, layered

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class TunerAlias:
    """Name of a tuner that is a family with other defaults."""

    family: str
    settings: Mapping[str, Any]
    summary: str


TUNER_ALIASES: Mapping[str, TunerAlias] = {
    "lora": TunerAlias(
        "res",
        {"self_attention": "lora", "cross_attention": "lora", "feed_forward": None},
        "LoRA on the linear layers of attention, a `res` tuner that `restune convert` writes for other programs; "
        "`--res.feed-forward lora` adds those of the feed-forward networks, `--res.projections lora` and "
        "`--res.convolutions lora` further layers of a U-Net",
    ),
}
"""Aliases by name; a run records the family and its settings."""


def without_aliases(settings: Mapping[str, Any], *lower: Mapping[str, Any]) -> dict[str, Any]:
    """Replace aliases in the setting `tuner` by their families, with the defaults of the aliases.

    Args:
        settings: settings by flat name, which override the defaults of the aliases.
        lower: settings of lower precedence than the defaults of the aliases.
    """
    merged = layered(*lower, settings)
    given = merged.get("tuner")
    names = (given,) if isinstance(given, str) else given if isinstance(given, tuple | list) else ()
    aliases = [TUNER_ALIASES[name] for name in names if isinstance(name, str) and name in TUNER_ALIASES]
    if not aliases:
        return merged
    own = dict(settings)
    for alias in aliases:
        if isinstance(own.get(alias.family), BaseModel):
            own[alias.family] = own[alias.family].model_dump(exclude_unset=True)
    merged = layered(*lower, *({alias.family: dict(alias.settings)} for alias in aliases), own)
    families = tuple(TUNER_ALIASES[name].family if name in TUNER_ALIASES else name for name in names)
    return {**merged, "tuner": families[0] if isinstance(given, str) else families}


def with_families(model: type[Model]) -> type[Model]:
    """Return a training config's class with a field for each registered family.

    Raises:
        SettingsError: if a family has the same name as another setting.
    """
    further = _further_families(model)
    return _extended(model, further) if further else model


def command_line_class(model: type[Model]) -> type[Model]:
    """Return `with_families(model)` with a help text of the field `tuner` that lists the families."""
    families = tuner_families()
    return _command_line_class(with_families(model), families)


def checked_families(model: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    """Validate the settings of families of other packages, and add the defaults of those that are trained.

    Args:
        model: class of the training config.
        values: its values by name.

    Raises:
        SettingsError: if a setting is unknown.
        ValidationError: if a setting of a family of another package is invalid.
    """
    unknown = first_unknown(with_families(model), values)
    if unknown is not None:
        raise SettingsError(unknown[1])
    further = _further_families(model)
    if not further:
        return values
    tuner = values.get("tuner", ())
    trained = (tuner,) if isinstance(tuner, str) else tuner if isinstance(tuner, tuple | list) else ()
    chosen = [family.name for family in further if family.name in values or family.name in trained]
    checked = _extended(BaseModel, further).model_validate({name: values[name] for name in chosen if name in values})
    return {**values, **{name: getattr(checked, name) for name in chosen}}


def _known(name: str) -> str:
    names = [family.name for family in tuner_families()]
    if name not in names:
        raise ValueError(
            f"{shown(name)} is not valid; use {', '.join(names[:-1])} or {names[-1]}, or install the package that "
            "provides it"
        )
    return name


FamilyName: TypeAlias = Annotated[str, AfterValidator(_known)]
"""Name of a registered tuner family."""


def _further_families(model: type[BaseModel]) -> tuple[TunerFamily, ...]:
    """Return the registered families for which the class has no field."""
    further = []
    for family in tuner_families():
        field = model.model_fields.get(family.name)
        if field is None and not hasattr(model, family.name):
            further.append(family)
        elif field is None or field.annotation is not family.config:
            raise SettingsError(
                f"The tuner family `{family.name}` of {family.config.__module__} has the name of a training setting; "
                f"register it under another name, or uninstall it."
            )
    return tuple(further)


@lru_cache(maxsize=8)
def _extended(model: type[Model], families: tuple[TunerFamily, ...]) -> type[Model]:
    fields: dict[str, Any] = {
        family.name: (family.config, Field(default=family.config(), description=family.summary)) for family in families
    }
    return create_model(model.__name__, __base__=model, __doc__=model.__doc__, **fields)


@lru_cache(maxsize=8)
def _command_line_class(model: type[Model], families: tuple[TunerFamily, ...]) -> type[Model]:
    name = Literal[(*(family.name for family in families), *TUNER_ALIASES)]  # type: ignore[valid-type]
    summaries = {family.name: family.summary for family in families}
    summaries |= {alias: found.summary for alias, found in TUNER_ALIASES.items()}
    described = " ".join(f"`{alias}`: {summary.rstrip('.')}." for alias, summary in summaries.items())
    tuner: Any = (name | tuple[name, ...], Field(default="skip", description=f"{_TUNER} {described}"))  # type: ignore[valid-type]
    return create_model(model.__name__, __base__=model, __doc__=model.__doc__, tuner=tuner)


_TUNER = (
    "Tuner family. Several families make one tuner with several parts; for one subject, combine `text` with another."
)
