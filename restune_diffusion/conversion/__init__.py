"""Read and write the files of other programs: ms-swift, SCEPTER, diffusers' LoRA loader, kohya's sd-scripts."""

from .bases import describe_checkpoint
from .convert import Layout, convert, load_any
from .formats import ExportLayout, export_tuner, import_tuner

__all__ = ["ExportLayout", "Layout", "convert", "describe_checkpoint", "export_tuner", "import_tuner", "load_any"]
