"""Base class of all settings models."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from .settings_merge import first_unknown


class Settings(BaseModel):
    """Frozen pydantic model that rejects unknown names and suggests the closest valid one."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, values: Any) -> Any:
        unknown = first_unknown(cls, values) if isinstance(values, dict) else None
        if unknown is not None:
            raise ValueError(unknown[1])
        return values
