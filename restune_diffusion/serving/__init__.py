"""Serving of one base with many tuners: an engine that batches requests at the denoising step, and a tuner library."""

from typing import TYPE_CHECKING

from ..utils.lazy_names import lazy_names

if TYPE_CHECKING:
    from .engine import Engine
    from .errors import EngineStopped, QueueFull, RequestCancelled, RequestFailed, RequestRefused
    from .library import TunerEntry, TunerLibrary
    from .limits import Limits
    from .requests import ImageRequest
    from .statistics import EngineStats
    from .tickets import GeneratedImage, Progress, Ticket, Timings

__all__ = [
    "Engine",
    "EngineStats",
    "EngineStopped",
    "GeneratedImage",
    "ImageRequest",
    "Limits",
    "Progress",
    "QueueFull",
    "RequestCancelled",
    "RequestFailed",
    "RequestRefused",
    "Ticket",
    "Timings",
    "TunerEntry",
    "TunerLibrary",
]

_MODULES = {
    "engine": ("Engine",),
    "errors": ("EngineStopped", "QueueFull", "RequestCancelled", "RequestFailed", "RequestRefused"),
    "library": ("TunerEntry", "TunerLibrary"),
    "limits": ("Limits",),
    "requests": ("ImageRequest",),
    "statistics": ("EngineStats",),
    "tickets": ("GeneratedImage", "Progress", "Ticket", "Timings"),
}

__getattr__ = lazy_names(__name__, _MODULES)
