"""Supported base models: sites where a tuner reads a feature or adds a residual, and structural fingerprints."""

from .bases import describe_base, site_module, structure_of
from .description import BaseInfo, Site, TextInfo
from .structure import Call, SiteHooks, Structure
from .text import TextEncoder, describe_text, text_encoders, text_stack
from .transformer_block import has_fused, is_fused
from .unet import late_skips, module_path, text_states

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
