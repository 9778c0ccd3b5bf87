"""Make condition images for control tuners from images: the public name of `restune_diffusion.imaging.conditions`."""

from .imaging.conditions import MAKERS, Maker, blur, canny, condition_to_tensor, make_condition, mask, palette

__all__ = ["MAKERS", "Maker", "blur", "canny", "condition_to_tensor", "make_condition", "mask", "palette"]
