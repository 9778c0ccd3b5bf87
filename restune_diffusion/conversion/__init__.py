"""Import and export of other programs' formats: diffusers LoRA, kohya's sd-scripts, ms-swift, SCEPTER."""

from .bases import describe_checkpoint
from .convert import Layout, convert, load_any
from .formats import ExportLayout, export_tuner, import_tuner

__all__ = ["ExportLayout", "Layout", "convert", "describe_checkpoint", "export_tuner", "import_tuner", "load_any"]
