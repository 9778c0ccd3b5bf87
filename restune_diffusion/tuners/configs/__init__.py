"""Settings of the built-in tuner families. Each module defines the settings of one family and registers it.

They are separate from the modules of the equations, `tuners/<family>.py`, so that a command line can show its help
without importing torch.
"""

from ..registry import PartConfig, parts_from_json, parts_to_json
from .bypass import BypassConfig
from .control import ControlConfig
from .res import ResConfig, ResKind
from .skip import SkipConfig
from .text import TextConfig

__all__ = [
    "BypassConfig",
    "ControlConfig",
    "PartConfig",
    "ResConfig",
    "ResKind",
    "SkipConfig",
    "TextConfig",
    "parts_from_json",
    "parts_to_json",
]
