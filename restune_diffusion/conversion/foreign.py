"""Read tensors and settings from files of other programs; the files are untrusted."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open

from ..utils.errors import TunerFileError
from ..utils.settings_merge import first_refused
from .reading.candidates import PICKLES, weights_file
from .reading.key_kinds import described

logger = logging.getLogger(__name__)

Config = TypeVar("Config", bound=BaseModel)

_SETTINGS_NAME = "adapter_config.json"
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
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

    def refuse_others(self, known: Iterable[str], what: str, partial: bool = False) -> None:
        """Raise `TunerFileError` if the file contains unknown tensors, or known ones with unusable values.

        Args:
            known: supported keys.
            what: description of the layout, for the message.
            partial: skip unknown tensors, with a warning, instead of raising an error.
        """
        known = set(known)
        others = self.tensors.keys() - known
        if others and not partial:
            raise TunerFileError(
                f"{self.path} cannot be read as {what}: it also contains {described(others)}, which no tuner family "
                "supports."
            )
        if others:
            logger.warning("%s: skipped tensors that no tuner supports: %s.", self.path, described(others))
        for key in sorted(known):
            tensor = self.tensors[key]
            # sd-scripts and diffusers store an alpha given as an integer as one.
            scalar = key.endswith(".alpha") and tensor.dtype in _INTEGERS
            if tensor.dtype not in _DTYPES and not scalar:
                raise TunerFileError(
                    f"{self.path} contains `{key}` as {tensor.dtype}; convert it to fp32, fp16 or bf16."
                )
            if not torch.isfinite(tensor).all():
                raise TunerFileError(f"{self.path} was not loaded: `{key}` contains NaN or infinity.")


def read_foreign(path: Path) -> ForeignFile:
    """Read a safetensors file, or the one in a folder, with the settings in the same folder.

    Args:
        path: a file, or a folder as written by ms-swift or diffusers.

    Raises:
        TunerFileError: if there is no file, or several, or it is a pickle or damaged.
    """
    file = weights_file(path.expanduser())
    if file.suffix.lower() in PICKLES:
        raise _pickle_refusal(file)
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 -- not a mapping
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        if _starts_like_pickle(file):
            raise _pickle_refusal(file) from error
        raise TunerFileError(f"{file} is not a safetensors file, or is damaged ({error}); get it again.") from error
    return ForeignFile(file, tensors, metadata, _read_settings(file.with_name(_SETTINGS_NAME)))


def some(names: list[str], shown: int = 3) -> str:
    """List a few names and count the rest."""
    listed = ", ".join(f"`{name:.120}`" for name in names[:shown])
    return listed + (f" and {len(names) - shown} more" if len(names) > shown else "")


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
        return kind.model_validate(settings)
    except ValidationError as error:
        reason = first_refused(error, kind).sentence()
        raise TunerFileError(f"{source} has no equivalent tuner: {reason}.") from error
