"""Read tensors and settings from files of other programs; the files are untrusted."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open

from ..utils.errors import TunerFileError

Config = TypeVar("Config", bound=BaseModel)

_SETTINGS_NAME = "adapter_config.json"
_WEIGHT_NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_LARGEST_SETTINGS = 1 << 20
_LARGEST_HEADER = 1 << 20


@dataclass(frozen=True)
class ForeignFile:
    """Content of a file of another program."""

    path: Path
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    """Entries of the safetensors header."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Content of `adapter_config.json` in the same folder, if there is one."""

    def refuse_others(self, known: Iterable[str], what: str) -> None:
        """Raise `TunerFileError` if the file contains unknown tensors.

        Args:
            known: supported keys.
            what: description of the layout, for the message.
        """
        others = sorted(self.tensors.keys() - set(known))
        if others:
            raise TunerFileError(
                f"{self.path} cannot be read as {what}: it also contains {some(others)}, which no tuner family "
                "supports."
            )


def read_foreign(path: Path) -> ForeignFile:
    """Read a safetensors file, or the one in a folder, with the settings in the same folder.

    Args:
        path: a file, or a folder as written by ms-swift or diffusers.

    Raises:
        TunerFileError: if there is no file, or it is a pickle, damaged, or has an unsupported dtype.
    """
    file = _weights_file(path.expanduser())
    if file.suffix.lower() in _PICKLES:
        raise _pickle_refusal(file)
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 -- not a mapping
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        if _starts_like_pickle(file):
            raise _pickle_refusal(file) from error
        raise TunerFileError(f"{file} is not a safetensors file, or is damaged ({error}); get it again.") from error
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise TunerFileError(f"{file} contains `{key}` as {tensor.dtype}; convert it to fp32, fp16 or bf16.")
        if not torch.isfinite(tensor).all():
            raise TunerFileError(f"{file} was not loaded: `{key}` contains NaN or infinity.")
    return ForeignFile(file, tensors, metadata, _read_settings(file.with_name(_SETTINGS_NAME)))


def some(names: list[str], shown: int = 3) -> str:
    """List a few names and count the rest."""
    listed = ", ".join(f"`{name:.120}`" for name in names[:shown])
    return listed + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _weights_file(path: Path) -> Path:
    """Return the weights file of a path: the file itself, or the weights in the folder or one of its subfolders."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise TunerFileError(f"There is no file or folder {path}.")
    for folder in (path, *sorted(child for child in path.iterdir() if child.is_dir())):
        for name in _WEIGHT_NAMES:
            if (folder / name).is_file():
                return folder / name
    found = sorted(file for file in path.glob("*") if file.suffix in (".safetensors", *_PICKLES))
    if len(found) == 1:
        return found[0]
    raise TunerFileError(f"{path} contains {len(found)} weights files; pass the path of the one to convert.")


def _starts_like_pickle(file: Path) -> bool:
    with file.open("rb") as opened:
        head = opened.read(2)
    return head == b"PK" or head[:1] == b"\x80"


def _pickle_refusal(file: Path) -> TunerFileError:
    return TunerFileError(
        f"{file} is a pickle; pickles can run code when they are opened and are never loaded here. If you trust "
        'its source, convert it first: python -c "import torch, safetensors.torch as s; '
        f"s.save_file(torch.load('{file.name}', weights_only=True), '{file.stem}.safetensors')\""
    )


def _read_settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        if file.stat().st_size > _LARGEST_SETTINGS:
            raise ValueError("it is too large")
        settings = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TunerFileError(f"{file} cannot be read as JSON ({error}).") from error
    if not isinstance(settings, dict):
        raise TunerFileError(f"{file} is not a JSON object.")
    return settings


def foreign_metadata(file: ForeignFile) -> dict[str, str]:
    """Return the header entries to copy to the converted tuner: all except those that describe the layout."""
    own = ("format", "lora_adapter_metadata", "modelspec.architecture", "modelspec.implementation",
           "modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")  # fmt: skip
    kept: dict[str, str] = {}
    space = _LARGEST_HEADER
    for key, value in sorted(file.metadata.items(), key=lambda entry: len(entry[1])):
        space -= len(key) + len(value)
        # sd-scripts may list every tag of every image; a tuner's header has a size limit.
        if space >= 0 and key not in own and not key.startswith("restune."):
            kept[key] = value
    return kept


def make_config(kind: type[Config], source: str, **settings: Any) -> Config:
    """Create a part's config from the settings of a file; raise `TunerFileError` if they are not valid."""
    try:
        return kind(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "its settings"
        raise TunerFileError(f"{source} has no equivalent tuner: {place}, {first['msg']}.") from error
