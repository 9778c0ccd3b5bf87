"""Tuner families as plain modules that map a feature to a residual, which is zero at the start.

Names are imported lazily, on first use. The settings of the families, in `configs`, are imported eagerly and do not
need torch.
"""

from typing import TYPE_CHECKING

from ..utils.lazy_names import lazy_names
from . import configs as configs
from .registry import (
    ConditionedConfig,
    PartConfig,
    TunerFamily,
    register_lazy_tuner_family,
    register_tuner_family,
    tuner_families,
    tuner_family,
    unregister_tuner_family,
)

if TYPE_CHECKING:
    from .base import Features, FrozenAttention, Operation, Part, init_linear, init_zero, pointwise
    from .bypass import BypassPart
    from .cascade import CascadeEncoder
    from .control import ControlPart
    from .lora import ResLora
    from .res import ResPart
    from .skip import SkipPart, SkipTuner
    from .text import TextPart

_MODULES = {
    "base": ("Features", "FrozenAttention", "Operation", "Part", "init_linear", "init_zero", "pointwise"),
    "bypass": ("BypassPart",),
    "cascade": ("CascadeEncoder",),
    "control": ("ControlPart",),
    "lora": ("ResLora",),
    "res": ("ResPart",),
    "skip": ("SkipPart", "SkipTuner"),
    "text": ("TextPart",),
}

__all__ = [
    "BypassPart",
    "CascadeEncoder",
    "ConditionedConfig",
    "ControlPart",
    "Features",
    "FrozenAttention",
    "Operation",
    "Part",
    "PartConfig",
    "ResLora",
    "ResPart",
    "SkipPart",
    "SkipTuner",
    "TextPart",
    "TunerFamily",
    "init_linear",
    "init_zero",
    "pointwise",
    "register_lazy_tuner_family",
    "register_tuner_family",
    "tuner_families",
    "tuner_family",
    "unregister_tuner_family",
]

# Lazy imports, so that a command line can show its help without importing torch.
__getattr__ = lazy_names(__name__, _MODULES)
