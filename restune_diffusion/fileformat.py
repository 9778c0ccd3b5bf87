"""Tuner files: one safetensors file with the config, the base's structure and the training facts in its header."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .config import PartConfig, parts_from_json, parts_to_json
from .errors import RestuneError, TunerFileError
from .sites import BaseInfo
from .tuner import Tuner

FORMAT_VERSION = 1
_VERSION_KEY = "restune.format_version"
_CONFIG_KEY = "restune.config"
_BASE_KEY = "restune.base"
_TRAINING_KEY = "restune.training"


@dataclass(frozen=True)
class TunerInfo:
    """What a tuner file says about itself, read from its header alone."""

    path: Path
    bytes: int
    num_parameters: int
    dtype: str
    configs: tuple[PartConfig, ...]
    base: BaseInfo
    training: dict[str, Any]
    metadata: dict[str, str]


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file that takes its name only when it is written, synced and closed without an error.

    A crash at any time leaves the old file or the new one, whole.

    Raises:
        TunerFileError: if the file cannot be written, for instance on a full disk; the old file is still there.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise TunerFileError(
            f"Cannot write {path}: {error.strerror or error}; free space or choose another folder, "
            "what was there before is unchanged."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


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
        TunerFileError: if the file cannot be written, or the tuner holds NaN or infinity.
    """
    path = Path(path)
    tensors = {key: value.detach().cpu().contiguous() for key, value in tuner.state_dict().items()}
    _check_finite(tensors, f"The tuner is not saved to {path}")
    header = {
        # Fields that other programs show, from the ModelSpec standard (github.com/Stability-AI/ModelSpec).
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{tuner.base.denoiser}/restune-{'-'.join(c.part for c in tuner.configs)}",
        "modelspec.implementation": "restune-diffusion",
        "modelspec.title": path.stem,
        **tuner.metadata,
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **(metadata or {}),
        "format": "pt",
        _VERSION_KEY: str(FORMAT_VERSION),
        _CONFIG_KEY: parts_to_json(tuner.configs),
        _BASE_KEY: tuner.base.model_dump_json(exclude_defaults=True),
    }
    if training is not None:
        header[_TRAINING_KEY] = json.dumps(training)
    with atomic_write(path) as file:
        file.write(save(tensors, header))


def load_tuner(path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> Tuner:
    """Read a tuner from its file.

    Args:
        path: a file that `save_tuner` wrote.
        dtype: dtype of the parameters; None keeps the file's.

    Returns:
        The tuner on the CPU; its tensors are mapped from the file where the dtype is kept.

    Raises:
        TunerFileError: if the file is missing, truncated, not a tuner file, or of a newer version.
    """
    info = read_info(path)
    tuner = _empty_tuner(info)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 -- not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise TunerFileError(f"{path} cannot be read: {error}; the file is damaged, get it again.") from error
    _check_finite(tensors, f"{path} is refused")
    if dtype is not None:
        tensors = {key: value.to(dtype) for key, value in tensors.items()}
    tuner.load_state_dict(tensors, assign=True)
    return tuner


def read_info(path: str | os.PathLike[str]) -> TunerInfo:
    """Read and check what a tuner file says about itself, without reading its tensors.

    Raises:
        TunerFileError: if the file is missing, truncated, not a tuner file, or of a newer version.
    """
    path = Path(path)
    shapes, dtypes, metadata = _read_header(path)
    _check_version(path, metadata)
    try:
        base = BaseInfo.model_validate_json(metadata[_BASE_KEY])
        configs = parts_from_json(metadata[_CONFIG_KEY])
        training = json.loads(metadata.get(_TRAINING_KEY, "{}"))
    except (KeyError, ValidationError, RestuneError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise TunerFileError(f"{path} has a damaged header ({reason}); get the file again.") from error
    if not isinstance(training, dict):
        raise TunerFileError(f"{path} has a damaged header (the training facts are no JSON object).")
    info = TunerInfo(
        path=path,
        bytes=path.stat().st_size,
        num_parameters=sum(shape.numel() for shape in shapes.values()),
        dtype="/".join(sorted(set(dtypes.values()))),
        configs=configs,
        base=base,
        training=training,
        metadata=metadata,
    )
    _check_shapes(info, shapes, dtypes)
    return info


def _read_header(path: Path) -> tuple[dict[str, torch.Size], dict[str, str], dict[str, str]]:
    if not path.is_file():
        raise TunerFileError(f"There is no tuner file at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 -- not a mapping
            shapes = {key: torch.Size(piece.get_shape()) for key, piece in slices.items()}
            dtypes = {key: str(piece.get_dtype()) for key, piece in slices.items()}
            return shapes, dtypes, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise TunerFileError(f"{path} {_why_unreadable(path, error)}") from error


def _why_unreadable(path: Path, error: Exception) -> str:
    """Say in words what a file is that safetensors refuses."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
            size = file.seek(0, os.SEEK_END)
    except OSError as failure:
        return f"cannot be read: {failure.strerror}."
    # The length of a header may begin with a pickle's first byte too, but its upper half is zero.
    opens_pickle = head[:1] == b"\x80" and (head[4:].strip(b"\0") or head[2:3] == b"\x95")
    if head[:2] == b"PK" or opens_pickle:
        return (
            "is a pickle, not a safetensors file; pickles can run code when they are opened and are never loaded: "
            "get the tuner as .safetensors."
        )
    if len(head) < 8 or struct.unpack("<Q", head)[0] < size < 1 << 40:
        return f"is truncated or damaged ({error}); get the file again."
    return f"is not a safetensors file, or is truncated ({error}); get the file again."


def _check_version(path: Path, metadata: Mapping[str, str]) -> None:
    version = metadata.get(_VERSION_KEY)
    if version is None:
        raise TunerFileError(
            f"{path} is a safetensors file but not a tuner of restune-diffusion; "
            "load a LoRA with load_lora_weights instead."
        )
    if not version.isascii() or not version.isdigit() or len(version) > 9:
        raise TunerFileError(f"{path} has a damaged header (format version {version!r:.40}); get the file again.")
    if int(version) > FORMAT_VERSION:
        raise TunerFileError(
            f"{path} is of format version {version}, this program reads up to {FORMAT_VERSION}; "
            "upgrade restune-diffusion."
        )


def _empty_tuner(info: TunerInfo) -> Tuner:
    try:
        return Tuner.empty(info.configs, info.base, info.metadata)
    except (RestuneError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise TunerFileError(f"{info.path} has a config that does not fit its base: {error}") from error


def _check_shapes(info: TunerInfo, shapes: Mapping[str, torch.Size], dtypes: Mapping[str, str]) -> None:
    """Compare the file's tensors with those that its config asks for, and name the first that differs."""
    expected = {key: value.shape for key, value in _empty_tuner(info).state_dict().items()}
    for key in [*expected, *shapes]:
        if expected.get(key) != shapes.get(key):
            wanted = f"shape {tuple(expected[key])}" if key in expected else "no such tensor"
            found = f"shape {tuple(shapes[key])}" if key in shapes else "no such tensor"
            raise TunerFileError(
                f"{info.path} is damaged: for `{key}` its config asks for {wanted}, it holds {found}."
            )
        if dtypes[key] not in ("F64", "F32", "F16", "BF16"):
            raise TunerFileError(f"{info.path} is damaged: `{key}` has the dtype {dtypes[key]}.")


def _check_finite(tensors: Mapping[str, torch.Tensor], refusal: str) -> None:
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise TunerFileError(f"{refusal}: `{key}` holds NaN or infinity; train again at a lower learning rate.")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def sync_directory(directory: Path) -> None:
    """Make sure that the names in a directory, a new or renamed file among them, survive a power cut."""
    # Windows has no directory handles to sync.
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
