"""Fields for the settings of tuner families that other packages register."""

# Without postponed annotations: pydantic 2.7 evaluates that of the extra fields in the module of each subclass.

from typing import TYPE_CHECKING

from pydantic import ConfigDict, SerializeAsAny

from ...tuners.configs import PartConfig
from ...utils.settings import Settings


class FamilyFields(Settings):
    """Base class of settings with a field for the config of each registered tuner family, under its name."""

    model_config = ConfigDict(extra="allow")
    if not TYPE_CHECKING:  # mypy would treat it as an argument of the constructor
        __pydantic_extra__: dict[str, SerializeAsAny[PartConfig]]
