"""The families of tuners as plain modules: a feature in, a residual out, zero at the start."""

from .base import Features, FrozenAttention, Operation, Part, init_linear, pointwise
from .bypass import BypassPart
from .cascade import CascadeEncoder
from .control import ControlPart
from .lora import ResLora
from .res import ResPart
from .skip import SkipPart, SkipTuner
from .text import TextPart, initialize_tokens

__all__ = [
    "BypassPart",
    "CascadeEncoder",
    "ControlPart",
    "Features",
    "FrozenAttention",
    "Operation",
    "Part",
    "ResLora",
    "ResPart",
    "SkipPart",
    "SkipTuner",
    "TextPart",
    "init_linear",
    "initialize_tokens",
    "pointwise",
]
