"""Tuner files: one safetensors file with the config, the base's structure and the training facts in its header."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..tuners.registry import parts_to_json
from ..tuners.tuner import Tuner
from ..utils.atomic_write import atomic_write
from ..utils.display import printable
from ..utils.errors import TunerFileError
from .header import (
    BASE_KEY,
    CONFIG_KEY,
    FORMAT_VERSION,
    MAX_HEADER_BYTES,
    TRAINING_KEY,
    VERSION_KEY,
    TunerInfo,
    check_dtypes,
    check_header,
    open_tensors,
    parse_metadata,
    read_info,
)

_ALIGNMENT = 64  # bytes: torch's own allocator starts every CPU tensor at a multiple of it
# As safetensors names them.
_DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

__all__ = ["TunerInfo", "load_tuner", "read_info", "save_tuner"]


def save_tuner(
    tuner: Tuner,
    path: str | os.PathLike[str],
    *,
    training: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a tuner to one safetensors file, atomically.

    Args:
        tuner: the tuner to write, on any device.
        path: where to write.
        training: facts about the training, stored as JSON.
        metadata: further header entries; they win over those the tuner already carries.

    Raises:
        TunerFileError: if the file cannot be written, or `load_tuner` would refuse it: the tuner holds NaN or
            infinity, the tensors of a part differ in dtype, or the metadata is beyond what a header may hold.
    """
    path = Path(path)
    tensors = {key: value.detach().cpu().contiguous() for key, value in tuner.state_dict().items()}
    header = {
        # Fields that other programs show, from the ModelSpec standard (github.com/Stability-AI/ModelSpec).
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{tuner.base.denoiser}/restune-{'-'.join(c.part for c in tuner.configs)}",
        "modelspec.implementation": "restune-diffusion",
        "modelspec.title": printable(path.stem),
        **tuner.metadata,
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        **(metadata or {}),
        "format": "pt",
        VERSION_KEY: str(FORMAT_VERSION),
        CONFIG_KEY: parts_to_json(tuner.configs),
        BASE_KEY: tuner.base.model_dump_json(exclude_defaults=True),
    }
    words = [word for config in tuner.configs for word in config.new_words]
    if words:
        header.setdefault("modelspec.trigger_phrase", ", ".join(words))
    if training is not None:
        header[TRAINING_KEY] = json.dumps(training)
    parts = _serialized(tensors, header, path)
    with atomic_write(path) as file:
        file.writelines(parts)


def _serialized(tensors: Mapping[str, torch.Tensor], header: dict[str, str], path: Path) -> list[bytes | memoryview]:
    """Turn tensors and header into the file's bytes, in parts, if `load_tuner` would take them back."""
    try:
        parse_metadata(header)
        check_dtypes({key: _DTYPE_NAMES.get(value.dtype, str(value.dtype)) for key, value in tensors.items()})
    except ValueError as error:
        raise TunerFileError(f"The tuner is not saved to {path}: {error}.") from error
    for key, value in tensors.items():
        if not _is_finite(value):
            raise TunerFileError(
                f"The tuner is not saved to {path}: `{key}` holds NaN or infinity; "
                "train again at a lower learning rate."
            )
    data: bytes = save(tensors, header)
    end = 8 + int.from_bytes(data[:8], "little")
    # The format lets spaces follow the header: with them the tensors start where `_mapped` need not copy them all.
    size = end - 8 + -end % _ALIGNMENT
    if size > MAX_HEADER_BYTES:
        raise TunerFileError(
            f"The tuner is not saved to {path}: its metadata makes a header of {size} bytes, where "
            f"{MAX_HEADER_BYTES} is the most; leave some of it out."
        )
    return [size.to_bytes(8, "little"), data[8:end].ljust(size), memoryview(data)[end:]]


def load_tuner(path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> Tuner:
    """Read a tuner from its file.

    Args:
        path: a file that `save_tuner` wrote.
        dtype: dtype of the parameters; None keeps the file's.

    Returns:
        The tuner on the CPU. Where the dtype is kept, tensors that start at a multiple of 64 bytes are mapped from the
        file, privately: changing them leaves the file alone. Replace a file that is in use by renaming another over
        it, as `save_tuner` does; one that is overwritten in place pulls the tuner's values away.

    Raises:
        TunerFileError: if the file is missing, truncated, not a tuner file, or of a newer version, or if a value is
            not finite in the file or in `dtype`.
    """
    path = Path(path)
    with open_tensors(path) as file:
        _, tuner = check_header(path, file)
        try:
            tensors = {key: _mapped(file, key) for key in tuner.state_dict()}
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            reason = printable(str(error), 200)
            raise TunerFileError(f"{path} cannot be read: {reason}; the file is damaged, get it again.") from error
    for key, value in tensors.items():
        kept = tensors[key] = value if dtype is None else value.to(dtype)
        if not _is_finite(kept):
            reason = (
                f"values beyond the range of {dtype}; load it in another dtype"
                if _is_finite(value)
                else "NaN or infinity; train again at a lower learning rate"
            )
            raise TunerFileError(f"{path} is refused: `{key}` holds {reason}.")
    tuner.load_state_dict(tensors, assign=True)
    return tuner


# Why a map, when reading the file into memory would be proof against another program that cuts it short in place (the
# kernel then ends whoever touches a page that is gone): processes that load the same tuner share its pages, a tuner
# that is not in use costs no memory that cannot be taken back, and loading copies little. Every writer here, and the
# Hub's client, replaces files by renaming; then the map keeps the old file. What goes to another device or dtype, as
# on most GPUs, is a copy and depends on the file no longer. safetensors' own `load_file` makes the same choice.
def _mapped(file: safe_open, key: str) -> torch.Tensor:
    value: torch.Tensor = file.get_tensor(key)
    # The format promises nothing about where tensors start. Kernels that take whole cache lines at a time round
    # otherwise from elsewhere, and a tuner should draw from its file just what it drew before it was saved.
    return value.clone() if value.data_ptr() % _ALIGNMENT else value


def _is_finite(value: torch.Tensor) -> bool:
    # NaN and infinity survive a sum, which reads the values once and makes no temporary, unlike `isfinite` on them
    # all. A sum of finite values may still overflow: then the extremes decide.
    return bool(value.sum().isfinite()) or all(bool(extreme.isfinite()) for extreme in torch.aminmax(value))
