"""Write caption files for the images of a folder with a captioner: a function from images to strings."""

from .registry import Captioner, CaptionerSettings, load_captioner, register_captioner

__all__ = ["Captioner", "CaptionerSettings", "load_captioner", "register_captioner"]
