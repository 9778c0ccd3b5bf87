"""Tell which program wrote a file, and hand it to the module that knows the layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, TypeAlias

from ..backbones import BaseInfo
from ..tuners.tuner import Tuner
from ..utils.errors import TunerFileError
from . import csc, diffusers_lora, kohya, scepter, swift
from .foreign import ForeignFile, read_foreign, some

ExportLayout: TypeAlias = Literal["diffusers", "kohya", "swift"]
"""Layouts that a tuner can be written in, beside our own."""

_Recognises: TypeAlias = Callable[[Iterable[str]], bool]
_READERS: tuple[tuple[_Recognises, Callable[[ForeignFile, BaseInfo], Tuner]], ...] = (
    (swift.recognises, swift.read),
    (csc.recognises, csc.read),
    (scepter.recognises, scepter.read),
)
_LORA_READERS: tuple[tuple[_Recognises, Callable[[ForeignFile, BaseInfo, bool], Tuner]], ...] = (
    (kohya.recognises, kohya.read),
    (diffusers_lora.recognises, diffusers_lora.read),
)
_WRITERS: dict[ExportLayout, Callable[[Tuner, Path], None]] = {
    "diffusers": diffusers_lora.write,
    "kohya": kohya.write,
    "swift": swift.write,
}
# Parts of keys of adapters that no part here computes.
_UNSUPPORTED = {
    "restuning_": "Res-Tuning-Bypass of ms-swift, whose side network (chained adapters that replace the input of "
    "the output head) is another than the bypass part here",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoCon with a middle convolution",
}


def import_tuner(path: Path, base: BaseInfo, *, partial: bool = False) -> Tuner:
    """Make a tuner of a file that another program wrote.

    Args:
        path: a safetensors file, or a folder as ms-swift or diffusers writes it.
        base: structure of the base that the file is for.
        partial: of a LoRA, leave out the modules on which no tuner acts, with a warning that names them.

    Returns:
        The tuner on the CPU, in the dtype of the file.

    Raises:
        TunerFileError: if the file cannot be read, or holds something that no part here computes; names it.
    """
    file = read_foreign(path)
    keys = file.tensors.keys()
    for mark, what in _UNSUPPORTED.items():
        marked = [key for key in keys if mark in key]
        if marked:
            raise TunerFileError(
                f"{file.path} holds {what}, for instance {some(marked, 1)}; no part here computes it."
            )
    for recognises, read in _READERS:
        if recognises(keys):
            return read(file, base)
    for recognises, read_lora in _LORA_READERS:
        if recognises(keys):
            return read_lora(file, base, partial)
    raise TunerFileError(
        f"{file.path} is in no layout that is known here; it holds {some(sorted(keys))}. "
        "Known are LoRAs of diffusers and kohya's sd-scripts, and SC- and CSC-Tuners of ms-swift and SCEPTER."
    )


def export_tuner(tuner: Tuner, path: Path, layout: ExportLayout) -> None:
    """Write a tuner for another program.

    Args:
        tuner: what to write.
        path: a file; for ms-swift a folder.
        layout: which program it is for.

    Raises:
        TunerFileError: if the tuner has parts that the layout has no place for, or cannot be written.
    """
    _WRITERS[layout](tuner, path)
