"""Convert tuner files between the formats of this package and other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from safetensors import SafetensorError, safe_open

from ..storage.tuner_file import load_tuner, save_tuner
from ..tuners.tuner import Tuner
from ..utils.errors import RestuneError
from ..utils.same_file import is_same_file
from .arithmetic import reduced
from .bases import checkpoint_weights, describe_checkpoint
from .foreign import read_foreign
from .formats import ExportLayout, export_tuner, import_tuner
from .products.reduction import Reduction

Layout: TypeAlias = Literal["restune"] | ExportLayout


def convert(
    source: Path,
    output: Path,
    layout: Layout,
    *,
    base: str | None = None,
    partial: bool = False,
    rank: int | None = None,
    energy: float | None = None,
) -> float:
    """Read a tuner in any supported layout and write it in another.

    Args:
        source: a file of this package, of diffusers, kohya's sd-scripts, ms-swift or SCEPTER, or a folder with one.
        output: output path: a file, or for ms-swift a folder.
        layout: layout of the output.
        base: checkpoint that a file of another program was trained for: a directory, or a repository id on the Hub.
        partial: skip LoRA modules that no tuner supports, with a warning, instead of raising an error.
        rank: largest rank of a LoRA layer; higher ones are reduced by a singular value decomposition.
        energy: fraction of each LoRA layer's squared norm to keep, from 0 to 1, at the smallest rank.

    Returns:
        The fraction of the LoRA layers' squared norm that was kept, 1 without `rank` and `energy`.

    Raises:
        RestuneError: if the file cannot be read, `base` is required and missing, or the layout cannot represent the
            tuner, or `output` is the file or folder that is read.
    """
    _refuse_own_input(source, output)
    reduction = Reduction(rank, energy)
    tuner = load_any(source, base=base, partial=partial, reduction=reduction)
    if layout == "restune":
        save_tuner(tuner, output)
    else:
        export_tuner(tuner, output, layout)
    return reduction.kept


def _refuse_own_input(source: Path, output: Path) -> None:
    files = source.rglob("*") if source.is_dir() else ()
    if any(is_same_file(output, path) for path in (source, *files)):
        raise RestuneError(f"The output {output} is also the input, which would be lost; choose another output.")


def load_any(
    source: Path, *, base: str | None = None, partial: bool = False, reduction: Reduction | None = None
) -> Tuner:
    """Read a tuner file of this package or of another program; the arguments are those of `convert`."""
    reduction = reduction or Reduction()
    if is_tuner_file(source):
        tuner = load_tuner(source)
        return reduced(tuner, reduction) if reduction.active else tuner
    if not source.expanduser().exists():
        raise RestuneError(f"There is no file or folder {source}.")
    if base is None:
        read_foreign(source)  # names what is wrong with the file itself
        raise RestuneError(
            f"{source} was written by another program and does not record its base; pass the checkpoint with --base."
        )
    return import_tuner(
        source,
        describe_checkpoint(base),
        partial=partial,
        reduction=reduction,
        base_weights=checkpoint_weights(base),
    )


def is_tuner_file(path: Path) -> bool:
    """Return whether a path is a tuner file of this package, by its header."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return any(key.startswith("restune.config") for key in file.metadata() or {})
    except (SafetensorError, OSError, ValueError, TypeError):
        return False
