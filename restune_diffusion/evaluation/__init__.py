"""Evaluation of a tuner against its base: `evaluate_tuner(pipeline, "watercolor.safetensors", data, output)`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluate import evaluate_tuner
    from .features import InceptionFeatures
    from .lpips import Lpips
    from .report import Evaluation

__all__ = ["Evaluation", "InceptionFeatures", "Lpips", "evaluate_tuner"]

_HOME = {"Evaluation": "report", "InceptionFeatures": "features", "Lpips": "lpips", "evaluate_tuner": "evaluate"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
