"""Registry of the supported base models."""

from __future__ import annotations

from torch import nn

from ..utils.errors import RestuneError
from .description import BaseInfo
from .motion_unet import MotionUNetStructure
from .pixart import PixArtStructure
from .structure import Structure
from .unet import UNetStructure
from .vit import ViTStructure

STRUCTURES: tuple[Structure, ...] = (UNetStructure(), MotionUNetStructure(), PixArtStructure(), ViTStructure())


def structure_of(base: nn.Module) -> Structure:
    """Return the structure that supports a base.

    Raises:
        RestuneError: if the model class is not supported; the message lists the supported classes.
    """
    for structure in STRUCTURES:
        if structure.fits(base):
            return structure
    known = ", ".join(structure.class_name for structure in STRUCTURES)
    raise RestuneError(f"Tuners attach to one of {known}, but this is a {type(base).__name__}.")


def describe_base(base: nn.Module) -> BaseInfo:
    """Return the sites and the structural fingerprint of a base.

    Args:
        base: a `UNet2DConditionModel`, a `UNetMotionModel`, a `PixArtTransformer2DModel` or a transformers `ViTModel`.

    Raises:
        RestuneError: if the model class or one of its blocks is not supported.
    """
    base = getattr(base, "_orig_mod", base)  # of a compiled model
    return structure_of(base).describe(base)


def site_module(base: nn.Module, site: str) -> nn.Module:
    """Return the module at a site of a transformer block, or one of its linear layers.

    Args:
        base: a supported model.
        site: name of the site, e.g. `down.1.attn.0.block.0.ff` or `mid.attn.0.block.0.self.to_q`.
    """
    return structure_of(base).module(base, site)
