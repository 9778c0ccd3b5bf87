"""Supported base models: sites where a tuner reads a feature or adds a residual, and structural fingerprints.

Names are imported lazily, on first use, so that the header of a tuner file is read without importing torch.
"""

from typing import TYPE_CHECKING

from ..utils.lazy_names import lazy_names

if TYPE_CHECKING:
    from .bases import describe_base, site_module, structure_of
    from .description import BaseInfo, Site, TextInfo
    from .structure import Call, SiteHooks, Structure
    from .text import TextEncoder, describe_text, text_encoders, text_stack
    from .transformer_block import has_fused, is_fused
    from .unet import late_skips, module_path, text_states

_MODULES = {
    "bases": ("describe_base", "site_module", "structure_of"),
    "description": ("BaseInfo", "Site", "TextInfo"),
    "structure": ("Call", "SiteHooks", "Structure"),
    "text": ("TextEncoder", "describe_text", "text_encoders", "text_stack"),
    "transformer_block": ("has_fused", "is_fused"),
    "unet": ("late_skips", "module_path", "text_states"),
}

__all__ = [
    "BaseInfo",
    "Call",
    "Site",
    "SiteHooks",
    "Structure",
    "TextEncoder",
    "TextInfo",
    "describe_base",
    "describe_text",
    "has_fused",
    "is_fused",
    "late_skips",
    "module_path",
    "site_module",
    "structure_of",
    "text_encoders",
    "text_stack",
    "text_states",
]

__getattr__ = lazy_names(__name__, _MODULES)
