"""Settings of the built-in tuner families, one a module, which registers its family.

They are apart from the modules of the equations, `tuners/<family>.py`, so that a command line shows them without
waiting for torch.
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
