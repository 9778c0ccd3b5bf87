"""Customize Stable Diffusion with detachable Res-Tuning tuners.

The public names load when they are first used, so that importing the package costs nothing beyond torch.
"""

from typing import TYPE_CHECKING

from .utils.lazy_names import lazy_names
from .utils.version import __version__ as __version__

if TYPE_CHECKING:
    from .backbones import BaseInfo, Site, describe_base, text_encoders
    from .hooks.attachment import Attachment, attach, detach
    from .hooks.manager import TunerManager
    from .hooks.merging import MergedLora, merge_lora
    from .hooks.weights import Schedule, TunerWeight, schedule
    from .imaging.masks import load_mask, mask_from_image
    from .pipelines.enable import enable_restune
    from .pipelines.loaders import RestuneLoaderMixin
    from .pipelines.stable_diffusion import (
        RestuneStableDiffusionControlNetPipeline,
        RestuneStableDiffusionImg2ImgPipeline,
        RestuneStableDiffusionInpaintPipeline,
        RestuneStableDiffusionPipeline,
        RestuneStableDiffusionXLControlNetPipeline,
        RestuneStableDiffusionXLImg2ImgPipeline,
        RestuneStableDiffusionXLInpaintPipeline,
        RestuneStableDiffusionXLPipeline,
    )
    from .storage.header import TunerInfo, read_info
    from .storage.hub import push_to_hub
    from .storage.tuner_cache import TunerCache
    from .storage.tuner_file import load_tuner, save_tuner
    from .tuners.configs import BypassConfig, ControlConfig, ResConfig, SkipConfig, TextConfig
    from .tuners.tuner import Tuner
    from .utils.errors import (
        BaseMismatchError,
        ConditionError,
        DataError,
        RestuneError,
        TrainingError,
        TunerFileError,
        TunerNameError,
    )

_MODULES = {
    "hooks.attachment": ("Attachment", "attach", "detach"),
    "hooks.manager": ("TunerManager",),
    "tuners.configs": ("BypassConfig", "ControlConfig", "ResConfig", "SkipConfig", "TextConfig"),
    "pipelines.enable": ("enable_restune",),
    "utils.errors": (
        "BaseMismatchError",
        "ConditionError",
        "DataError",
        "RestuneError",
        "TrainingError",
        "TunerFileError",
        "TunerNameError",
    ),
    "storage.tuner_file": ("load_tuner", "save_tuner"),
    "storage.header": ("TunerInfo", "read_info"),
    "storage.hub": ("push_to_hub",),
    "pipelines.loaders": ("RestuneLoaderMixin",),
    "imaging.masks": ("load_mask", "mask_from_image"),
    "hooks.merging": ("MergedLora", "merge_lora"),
    "pipelines.stable_diffusion": (
        "RestuneStableDiffusionControlNetPipeline",
        "RestuneStableDiffusionImg2ImgPipeline",
        "RestuneStableDiffusionInpaintPipeline",
        "RestuneStableDiffusionPipeline",
        "RestuneStableDiffusionXLControlNetPipeline",
        "RestuneStableDiffusionXLImg2ImgPipeline",
        "RestuneStableDiffusionXLInpaintPipeline",
        "RestuneStableDiffusionXLPipeline",
    ),
    "backbones": ("BaseInfo", "Site", "describe_base", "text_encoders"),
    "tuners.tuner": ("Tuner",),
    "storage.tuner_cache": ("TunerCache",),
    "hooks.weights": ("Schedule", "TunerWeight", "schedule"),
}

__all__ = [
    "Attachment",
    "BaseInfo",
    "BaseMismatchError",
    "BypassConfig",
    "ConditionError",
    "ControlConfig",
    "DataError",
    "MergedLora",
    "ResConfig",
    "RestuneError",
    "RestuneLoaderMixin",
    "RestuneStableDiffusionControlNetPipeline",
    "RestuneStableDiffusionImg2ImgPipeline",
    "RestuneStableDiffusionInpaintPipeline",
    "RestuneStableDiffusionPipeline",
    "RestuneStableDiffusionXLControlNetPipeline",
    "RestuneStableDiffusionXLImg2ImgPipeline",
    "RestuneStableDiffusionXLInpaintPipeline",
    "RestuneStableDiffusionXLPipeline",
    "Schedule",
    "Site",
    "SkipConfig",
    "TextConfig",
    "TrainingError",
    "Tuner",
    "TunerCache",
    "TunerFileError",
    "TunerInfo",
    "TunerManager",
    "TunerNameError",
    "TunerWeight",
    "attach",
    "describe_base",
    "detach",
    "enable_restune",
    "load_mask",
    "load_tuner",
    "mask_from_image",
    "merge_lora",
    "push_to_hub",
    "read_info",
    "save_tuner",
    "schedule",
    "text_encoders",
]

__getattr__ = lazy_names(__name__, _MODULES)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
