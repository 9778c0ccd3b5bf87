"""The weights file of a path: a file, or the only candidate in a folder."""

from __future__ import annotations

import logging
from pathlib import Path

from ...utils.errors import TunerFileError

logger = logging.getLogger(__name__)

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WEIGHT_NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_ENCODERS = {"text_encoder", "text_encoder_2"}
_SHOWN = 12


def weights_file(path: Path) -> Path:
    """Return the weights file of a path.

    Args:
        path: a file, or a folder with one weights file in it or in its subfolders; of the subfolders `unet`,
            `text_encoder` and `text_encoder_2`, the file of `unet` is taken, with a warning.

    Raises:
        TunerFileError: if there is no file, or several.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise TunerFileError(f"There is no file or folder {path}.")
    children = sorted(child for child in path.iterdir() if child.is_dir())
    found = _named(path)
    if not found:
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in (".safetensors", *PICKLES))
        found += [file for child in children for file in _named(child)]
    folders = {file.parent.name for file in found}
    if len(found) > 1 and len(found) == len(folders) and "unet" in folders and folders - {"unet"} <= _ENCODERS:
        others = [str(file) for file in found if file.parent.name != "unet"]
        logger.warning("%s: only the weights of the U-Net are read; not read: %s.", path, ", ".join(others))
        found = [file for file in found if file.parent.name == "unet"]
    if len(found) == 1:
        return found[0]
    if not found:
        raise TunerFileError(f"{path} contains no weights file, neither in itself nor in a subfolder.")
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    listed = ", ".join(str(file.relative_to(path)) for file in found[:_SHOWN])
    raise TunerFileError(
        f"{path} contains {len(found)} weights files: {listed}{more}. Pass the path of the one to convert."
    )


def _named(folder: Path) -> list[Path]:
    return [folder / name for name in _WEIGHT_NAMES if (folder / name).is_file()]
