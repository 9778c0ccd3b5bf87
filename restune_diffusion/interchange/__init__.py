"""Read and write the files of other programs: the public name of `restune_diffusion.conversion`."""

from ..conversion import ExportLayout, Layout, convert, describe_checkpoint, export_tuner, import_tuner, load_any

__all__ = ["ExportLayout", "Layout", "convert", "describe_checkpoint", "export_tuner", "import_tuner", "load_any"]
