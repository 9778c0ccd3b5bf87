"""The families of tuners as plain modules: a feature in, a residual out, zero at the start."""

from .base import Features, Part, init_linear, pointwise
from .bypass import BypassPart
from .control import ControlPart
from .skip import SkipPart, SkipTuner

__all__ = ["BypassPart", "ControlPart", "Features", "Part", "SkipPart", "SkipTuner", "init_linear", "pointwise"]
