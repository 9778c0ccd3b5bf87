"""Detect the layout of a file, and call its reader or writer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, TypeAlias

from ..backbones import BaseInfo
from ..tuners.tuner import Tuner
from ..utils.errors import TunerFileError
from . import csc, diffusers_lora, kohya, scepter, swift
from .foreign import ForeignFile, read_foreign, some
from .products.options import BaseWeights, ImportOptions
from .products.reduction import Reduction
from .reading.key_kinds import described

ExportLayout: TypeAlias = Literal["diffusers", "kohya", "swift"]
"""Layouts of other programs that a tuner can be exported to."""

_Recognizes: TypeAlias = Callable[[Iterable[str]], bool]
_READERS: tuple[tuple[_Recognizes, Callable[[ForeignFile, BaseInfo], Tuner]], ...] = (
    (swift.recognizes, swift.read),
    (csc.recognizes, csc.read),
    (scepter.recognizes, scepter.read),
)
_LORA_READERS: tuple[tuple[_Recognizes, Callable[[ForeignFile, BaseInfo, ImportOptions], Tuner]], ...] = (
    (kohya.recognizes, kohya.read),
    (diffusers_lora.recognizes, diffusers_lora.read),
)
_WRITERS: dict[ExportLayout, Callable[[Tuner, Path], None]] = {
    "diffusers": diffusers_lora.write,
    "kohya": kohya.write,
    "swift": swift.write,
}
# Substrings of keys that identify adapters without an equivalent tuner family.
_UNSUPPORTED = {
    "restuning_": "Res-Tuning-Bypass of ms-swift, whose side network (chained adapters that replace the input of "
    "the output head) differs from the bypass family",
    "oft_": "OFT",
}


def recognized_family(keys: Iterable[str]) -> str | None:
    """Return what `import_tuner` reads a file with these keys as: `skip`, `control` or `lora`; None if it cannot."""
    listed = list(keys)
    if any(recognizes(listed) for recognizes, _ in _READERS):
        return "control" if csc.recognizes(listed) else "skip"
    return "lora" if any(recognizes(listed) for recognizes, _ in _LORA_READERS) else None


def import_tuner(
    path: Path,
    base: BaseInfo,
    *,
    partial: bool = False,
    reduction: Reduction | None = None,
    base_weights: BaseWeights | None = None,
) -> Tuner:
    """Convert a file of another program to a tuner.

    Args:
        path: a safetensors file, or a folder as written by ms-swift or diffusers.
        base: structure of the base that the file was trained for.
        partial: skip LoRA modules that no tuner supports, with a warning that lists them, instead of raising an error.
        reduction: limit of the rank of LoRA layers; LoHa, LoKr, DoRA and full differences need a high one to be exact.
        base_weights: weights of the base by site, which DoRA needs.

    Returns:
        The tuner on the CPU, in the dtype of the file, or in fp32 where that cannot hold the layers.

    Raises:
        TunerFileError: if the file cannot be read, or contains tensors that no tuner family supports.
    """
    file = read_foreign(path)
    keys = file.tensors.keys()
    lora = any(recognizes(keys) for recognizes, _ in _LORA_READERS)
    for mark, what in ({} if partial and lora else _UNSUPPORTED).items():
        marked = [key for key in keys if mark in key]
        if marked:
            raise TunerFileError(
                f"{file.path} contains {what}, for example {some(marked, 1)}; no tuner family supports it."
            )
    for recognizes, read in _READERS:
        if recognizes(keys):
            return read(file, base)
    for recognizes, read_lora in _LORA_READERS:
        if recognizes(keys):
            return read_lora(file, base, ImportOptions(partial, reduction or Reduction(), base_weights))
    raise TunerFileError(
        f"{file.path} has an unknown layout; it contains {described(keys)}. "
        "Supported are LoRAs of diffusers and kohya's sd-scripts, and SC- and CSC-Tuners of ms-swift and SCEPTER."
    )


def export_tuner(tuner: Tuner, path: Path, layout: ExportLayout) -> None:
    """Write a tuner in the layout of another program.

    Args:
        tuner: tuner to write.
        path: path of the file; for ms-swift of the folder.
        layout: layout to write.

    Raises:
        TunerFileError: if the layout cannot represent the tuner, or the file cannot be written.
    """
    _WRITERS[layout](tuner, path)
