"""Tuner file format: a safetensors file with config, base structure and training facts in its header."""

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

_ALIGNMENT = 64  # bytes: torch's allocator starts every CPU tensor at a multiple of it
# Names of dtypes in safetensors.
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
        path: path of the file.
        training: facts about the training, stored as JSON.
        metadata: further header entries; they take precedence over those of the tuner.

    Raises:
        TunerFileError: if the file cannot be written, or `load_tuner` would reject it: the tuner contains NaN or
            infinity, the tensors of a part differ in dtype, or the metadata exceeds the size limit of a header.
    """
    path = Path(path)
    tensors = {key: value.detach().cpu().contiguous() for key, value in tuner.state_dict().items()}
    header = {
        # Fields of the ModelSpec standard (github.com/Stability-AI/ModelSpec), which other programs display.
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
    tokens = [token for config in tuner.configs for token in config.new_words]
    if tokens:
        header.setdefault("modelspec.trigger_phrase", ", ".join(tokens))
    if training is not None:
        header[TRAINING_KEY] = json.dumps(training)
    parts = _serialized(tensors, header, path)
    with atomic_write(path) as file:
        file.writelines(parts)


def _serialized(tensors: Mapping[str, torch.Tensor], header: dict[str, str], path: Path) -> list[bytes | memoryview]:
    """Serialize tensors and header to the file's bytes, in parts; reject what `load_tuner` would reject."""
    try:
        parse_metadata(header)
        check_dtypes({key: _DTYPE_NAMES.get(value.dtype, str(value.dtype)) for key, value in tensors.items()})
    except ValueError as error:
        raise TunerFileError(f"The tuner was not saved to {path}: {error}.") from error
    for key, value in tensors.items():
        if not _is_finite(value):
            raise TunerFileError(
                f"The tuner was not saved to {path}: `{key}` contains NaN or infinity; "
                "train again with a lower learning rate."
            )
    data: bytes = save(tensors, header)
    end = 8 + int.from_bytes(data[:8], "little")
    # The format allows spaces after the header: padding aligns the tensors, so that `_mapped` need not copy them.
    size = end - 8 + -end % _ALIGNMENT
    if size > MAX_HEADER_BYTES:
        raise TunerFileError(
            f"The tuner was not saved to {path}: its header has {size} bytes, but the limit is {MAX_HEADER_BYTES}; "
            "reduce the metadata."
        )
    return [size.to_bytes(8, "little"), data[8:end].ljust(size), memoryview(data)[end:]]


def load_tuner(path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> Tuner:
    """Read a tuner from its file.

    Args:
        path: a file that `save_tuner` wrote.
        dtype: dtype of the parameters; None keeps the dtype of the file.

    Returns:
        The tuner on the CPU. If the dtype is kept, tensors that start at a multiple of 64 bytes are memory-mapped
        (copy-on-write): modifying them does not modify the file. Replace a file in use by renaming a new file over
        it, as `save_tuner` does; overwriting it in place corrupts the loaded tuner.

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
                else "NaN or infinity; train again with a lower learning rate"
            )
            raise TunerFileError(f"{path} was not loaded: `{key}` contains {reason}.")
    tuner.load_state_dict(tensors, assign=True)
    return tuner


# Memory-mapping instead of reading: processes that load the same tuner share its pages, an unused tuner occupies only
# reclaimable memory, and loading copies little. The drawback: if another program truncates the file in place, access
# to a missing page kills the process (SIGBUS). All writers of this package and the Hub client replace files by
# renaming, after which the mapping keeps the old file. A tuner on another device or in another dtype, as on most GPUs,
# is a copy and independent of the file. safetensors' `load_file` also maps the file.
def _mapped(file: safe_open, key: str) -> torch.Tensor:
    value: torch.Tensor = file.get_tensor(key)
    # The format does not guarantee alignment. Vectorized kernels round differently on unaligned data, and a loaded
    # tuner must generate exactly the images that it generated before it was saved.
    return value.clone() if value.data_ptr() % _ALIGNMENT else value


def _is_finite(value: torch.Tensor) -> bool:
    # NaN and infinity propagate through a sum, which reads the values once and allocates no temporary, unlike
    # elementwise `isfinite`. A sum of finite values may overflow: then minimum and maximum decide.
    return bool(value.sum().isfinite()) or all(bool(extreme.isfinite()) for extreme in torch.aminmax(value))
