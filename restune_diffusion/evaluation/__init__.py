"""Evaluation of a tuner against its base: `evaluate_tuner(pipeline, "watercolor.safetensors", data, output)`."""

from typing import TYPE_CHECKING

from ..utils.lazy_names import lazy_names

if TYPE_CHECKING:
    from .evaluate import evaluate_tuner
    from .features import InceptionFeatures
    from .lpips import Lpips
    from .report import Evaluation

__all__ = ["Evaluation", "InceptionFeatures", "Lpips", "evaluate_tuner"]

_MODULES = {
    "report": ("Evaluation",),
    "features": ("InceptionFeatures",),
    "lpips": ("Lpips",),
    "evaluate": ("evaluate_tuner",),
}

__getattr__ = lazy_names(__name__, _MODULES)
