"""Tuner families as plain modules that map a feature to a residual, which is zero at the start.

Names are imported lazily, on first use. The settings of the families, in `configs`, are imported eagerly and do not
need torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
_HOME = {name: module for module, names in _MODULES.items() for name in names}

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


def __getattr__(name: str) -> Any:
    # Lazy imports, so that a command line can show its help without importing torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
