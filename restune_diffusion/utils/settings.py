"""Base class of all settings models."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from .settings_merge import first_unknown


def unwrap_help_texts(model: type[BaseModel]) -> None:
    """Join the lines of a model's field docstrings, so that `--help` wraps them at the width of the terminal."""
    for field in model.model_fields.values():
        if field.description is not None:
            field.description = " ".join(field.description.split())


class Settings(BaseModel):
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
