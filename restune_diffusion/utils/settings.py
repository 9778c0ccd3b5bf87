"""Base class of all settings models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from .errors import SettingsError
from .settings_merge import RefusedSetting, first_refused, first_unknown


def unwrap_help_texts(model: type[BaseModel]) -> None:
    """Join the lines of a model's field docstrings, so that `--help` wraps them at the width of the terminal."""
    for field in model.model_fields.values():
        if field.description is not None:
            field.description = " ".join(field.description.split())


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass as ModelType
else:
    ModelType = type(BaseModel)


class SettingsType(ModelType):
    """Metaclass of settings whose constructor raises one sentence; pydantic's own error lists its types."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        """Return an instance.

        Raises:
            SettingsError: if a setting is unknown, missing or invalid.
        """
        try:
            return super().__call__(*args, **values)
        except ValidationError as error:
            raise SettingsError(cls.refused(error).sentence()) from error

    def refused(cls, error: ValidationError) -> RefusedSetting:
        """Return the first invalid setting of a validation error; a class may define its own."""
        return first_refused(error, cls)  # type: ignore[arg-type]


class Settings(BaseModel, metaclass=SettingsType):
    """Frozen pydantic model that rejects unknown names and suggests the closest valid one."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, use_attribute_docstrings=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        unwrap_help_texts(cls)

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, values: Any) -> Any:
        unknown = first_unknown(cls, values) if isinstance(values, dict) else None
        if unknown is not None:
            raise ValueError(unknown[1])
        return values
