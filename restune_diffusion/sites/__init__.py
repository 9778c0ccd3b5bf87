"""Find the places on a base where a tuner can read a feature or add a residual, and describe the base."""

from .bases import describe_base, site_module, structure_of
from .description import BaseInfo, Site
from .structure import Call, SiteHooks, Structure
from .unet import module_path, text_states

__all__ = [
    "BaseInfo",
    "Call",
    "Site",
    "SiteHooks",
    "Structure",
    "describe_base",
    "module_path",
    "site_module",
    "structure_of",
    "text_states",
]
