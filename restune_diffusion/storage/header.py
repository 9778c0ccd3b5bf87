"""Header of a tuner file: reading, and all checks that need no tensor values.

Files are untrusted: all sizes in a header are limited here before anything is built from it. torch is imported only to
compare the tensors' shapes with the config.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from ..backbones.description import BaseInfo
from ..backbones.site_names import is_dotted_name
from ..tuners.registry import PartConfig, parts_from_json
from ..utils.display import printable
from ..utils.errors import RestuneError, TunerFileError, UnknownFamilyError
from ..utils.settings_merge import first_refused

if TYPE_CHECKING:
    from ..tuners.tuner import Tuner

FORMAT_VERSION = 1
VERSION_KEY = "restune.format_version"
CONFIG_KEY = "restune.config"
BASE_KEY = "restune.base"
TRAINING_KEY = "restune.training"

# Enough for thousands of tensors and a thumbnail; safetensors allows 100 MB, which takes a multiple of that in memory.
MAX_HEADER_BYTES = 8 << 20
# A part builds modules for each site, half a millisecond per site; SDXL with all its attention has about 300 sites.
_MAX_SITES = 1024
_MAX_ENTRY = {CONFIG_KEY: 1 << 16, BASE_KEY: 1 << 18, TRAINING_KEY: 1 << 20}
_MAX_DEPTH = 32
_ATTEMPTS = 20
_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class TunerInfo:
    """Facts about a tuner file, read from its header."""

    path: Path
    bytes: int
    num_parameters: int
    dtype: str
    configs: tuple[PartConfig, ...]
    base: BaseInfo
    training: dict[str, Any]
    metadata: dict[str, str]

    @property
    def trigger_words(self) -> list[str]:
        """Words that prompts need for the tuner to act as trained; placeholder tokens among them."""
        words = self.training.get("trigger_words")
        if isinstance(words, list) and words:
            return [str(word) for word in words]
        return phrase_words(self.metadata)


def phrase_words(metadata: Mapping[str, str]) -> list[str]:
    """Return the trigger words of the model specification, in the header of any program's file."""
    phrase = metadata.get("modelspec.trigger_phrase", "")
    return [word for word in (part.strip() for part in phrase.split(",")) if word]


def read_info(path: str | os.PathLike[str]) -> TunerInfo:
    """Read and check the header of a tuner file, without reading its tensors.

    Raises:
        TunerFileError: if the file is missing, truncated, not a tuner file, or of a newer version.
    """
    path = Path(path)
    with open_tensors(path) as file:
        return check_header(path, file)[0]


def read_header(path: str | os.PathLike[str]) -> TunerInfo:
    """Read the header of a tuner file without importing torch.

    Of the tensors, unlike `read_info`, it checks the dtypes and that each belongs to a part, not that they are exactly
    those of the config.

    Raises:
        TunerFileError: if the file is missing, truncated, not a tuner file, or of a newer version.
    """
    path = Path(path)
    with open_tensors(path, "numpy") as file:
        metadata, (configs, base, training) = _checked_metadata(path, file)
        shapes, dtypes = _tensor_entries(file)
    parts = {config.part for config in configs}
    try:
        for key in shapes:
            if key.split(".")[0] not in parts:
                raise ValueError(_not_in_config(key))
        check_dtypes(dtypes)
    except ValueError as error:
        raise TunerFileError(f"{path} is damaged: {error}; get the file again.") from error
    parameters = sum(map(math.prod, shapes.values()))
    return _info(path, parameters, dtypes, configs, base, training, metadata)


def _first_file(folder: Path) -> str:
    """Return an example of a file in a folder, or nothing."""
    found = sorted(folder.glob("*.safetensors"))
    return f", such as {found[0]}" if found else ""


def open_tensors(path: Path, framework: Literal["pt", "numpy"] = "pt") -> safe_open:
    """Open a safetensors file, memory-mapped, for use in a `with` statement.

    Args:
        path: path of the file.
        framework: type of the tensors that are read; "numpy" does not import torch.

    Raises:
        TunerFileError: if the file is missing or not a complete safetensors file.
    """
    try:
        # A pipe or a device could block forever.
        if path.is_dir():
            raise TunerFileError(f"{path} is a folder; give the safetensors file in it{_first_file(path)}.")
        if not path.is_file():
            raise TunerFileError(f"There is no tuner file at {path}.")
        _check_declared_size(path)
        return _open_whole(path, framework)
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise TunerFileError(f"{path} {_why_unreadable(path, error)}") from error


def check_header(path: Path, file: safe_open) -> tuple[TunerInfo, Tuner]:
    """Check a header, and build the tuner that it describes on the meta device.

    Returns:
        The facts of the header, and a tuner on the meta device with the names and shapes of the file's tensors.

    Raises:
        TunerFileError: if the file is not a tuner file, is of a newer version, or is inconsistent.
    """
    metadata, (configs, base, training) = _checked_metadata(path, file)
    tuner = _empty_tuner(path, configs, base, metadata)
    expected = {key: tuple(value.shape) for key, value in tuner.state_dict().items()}
    shapes, dtypes = _read_tensor_entries(path, file, expected)
    try:
        _check_shapes(shapes, expected)
        check_dtypes(dtypes)
    except ValueError as error:
        raise TunerFileError(f"{path} is damaged: {error}; get the file again.") from error
    return _info(path, tuner.num_parameters(), dtypes, configs, base, training, metadata), tuner


def _info(
    path: Path,
    num_parameters: int,
    dtypes: Mapping[str, str],
    configs: tuple[PartConfig, ...],
    base: BaseInfo,
    training: dict[str, Any],
    metadata: dict[str, str],
) -> TunerInfo:
    dtype = "/".join(sorted(set(dtypes.values())))
    return TunerInfo(path, path.stat().st_size, num_parameters, dtype, configs, base, training, metadata)


def _checked_metadata(
    path: Path, file: safe_open
) -> tuple[dict[str, str], tuple[tuple[PartConfig, ...], BaseInfo, dict[str, Any]]]:
    """Return the entries of a header, and the configs, the base and the training facts in it."""
    metadata: dict[str, str] = file.metadata() or {}
    _check_version(path, metadata)
    try:
        return metadata, parse_metadata(metadata)
    except UnknownFamilyError as error:
        raise TunerFileError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise TunerFileError(f"{path} has a damaged header ({error}); get the file again.") from error


def parse_metadata(metadata: Mapping[str, str]) -> tuple[tuple[PartConfig, ...], BaseInfo, dict[str, Any]]:
    """Parse the configs, the base and the training facts from the entries of a header.

    Raises:
        UnknownFamilyError: if a part is of a tuner family that is not registered.
        ValueError: if an entry is not valid; the message is a clause, for use in a sentence.
    """
    try:
        _read_json(metadata, CONFIG_KEY)
        configs = parts_from_json(metadata[CONFIG_KEY])
        base = BaseInfo.model_validate(_read_json(metadata, BASE_KEY))
    except ValidationError as error:
        first = first_refused(error, BaseInfo)
        place = ".".join(map(str, first.place))
        raise ValueError(printable(f"{BASE_KEY} is not valid at {place}: {first.reason}", 200)) from error
    except UnknownFamilyError:
        raise
    except RestuneError as error:
        raise ValueError(printable(str(error).rstrip("."), 200)) from error
    _check_base(base)
    training = _read_json(metadata, TRAINING_KEY) if TRAINING_KEY in metadata else {}
    if not isinstance(training, dict):
        raise ValueError("the training facts are not a JSON object")
    # Only the name may be any text, because it can be the name of a folder.
    return configs, base.model_copy(update={"name": printable(base.name, 200)}), training


def check_dtypes(dtypes: Mapping[str, str]) -> None:
    """Check that all tensors are floating point, and that those of a part (`<part>.<rest of the key>`) share a dtype.

    Raises:
        ValueError: if a tensor does not; the message names the first one.
    """
    of_part: dict[str, str] = {}
    for key, dtype in dtypes.items():
        if dtype not in _DTYPES:
            raise ValueError(f"`{key}` has the dtype {dtype}")
        first = of_part.setdefault(key.split(".")[0], dtype)
        if dtype != first:
            raise ValueError(f"`{key}` has the dtype {dtype} in a part of dtype {first}")


def _check_declared_size(path: Path) -> None:
    with path.open("rb") as file:
        declared = int.from_bytes(file.read(8), "little")
        size = file.seek(0, os.SEEK_END)
    if MAX_HEADER_BYTES < declared <= size:
        raise TunerFileError(
            f"{path} declares a header of {declared} bytes, but a tuner file has {MAX_HEADER_BYTES} at most; get the "
            "file again."
        )


def _open_whole(path: Path, framework: str) -> safe_open:
    """Open a file that may be replaced at any time.

    safetensors opens the file by name twice, for the header and for the tensors; if it is replaced by renaming in
    between, the header of one tuner would be combined with the tensors of another.
    """
    for _ in range(_ATTEMPTS):
        before = _identity(path)
        try:
            file = safe_open(path, framework=framework)
        except (SafetensorError, OSError, RuntimeError):
            if _identity(path) == before:
                raise
        else:
            if _identity(path) == before:
                return file
    raise TunerFileError(f"{path} is being replaced repeatedly while it is read; load it when its writer is done.")


def _identity(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _why_unreadable(path: Path, error: Exception) -> str:
    """Return a clause that describes a file that safetensors cannot read."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
            size = file.seek(0, os.SEEK_END)
    except (OSError, ValueError) as failure:
        return f"cannot be read: {getattr(failure, 'strerror', None) or failure}."
    reason = printable(str(error), 200)
    # A header's length may start with the first byte of a pickle too, but its upper half is zero.
    opens_pickle = head[:1] == b"\x80" and (head[4:].strip(b"\0") or head[2:3] == b"\x95")
    if head[:2] == b"PK" or opens_pickle:
        return (
            "is a pickle, not a safetensors file; pickles can run code when they are opened and are never loaded: "
            "get the tuner as .safetensors."
        )
    if len(head) < 8 or struct.unpack("<Q", head)[0] < size < 1 << 40:
        return f"is truncated or damaged ({reason}); get the file again."
    return f"is not a safetensors file, or is truncated ({reason}); get the file again."


def _check_version(path: Path, metadata: Mapping[str, str]) -> None:
    version = metadata.get(VERSION_KEY)
    if version is None:
        raise TunerFileError(
            f"{path} is a safetensors file but not a tuner of restune-diffusion; "
            "load a LoRA with load_lora_weights, or convert it first: restune convert."
        )
    if not version.isascii() or not version.isdigit() or len(version) > 9:
        raise TunerFileError(f"{path} has a damaged header (format version {version!r:.40}); get the file again.")
    if int(version) > FORMAT_VERSION:
        raise TunerFileError(
            f"{path} has format version {version}, but this version of restune-diffusion reads up to "
            f"{FORMAT_VERSION}; upgrade restune-diffusion."
        )


def _read_json(metadata: Mapping[str, str], key: str) -> Any:
    """Parse an entry to values that JSON can represent: numbers beyond the range of a float stay text."""
    text = metadata.get(key)
    if text is None:
        raise ValueError(f"{key} is missing")
    if len(text) > _MAX_ENTRY[key]:
        raise ValueError(f"{key} is longer than {_MAX_ENTRY[key]} characters")
    try:
        value = json.loads(text, parse_constant=str, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(printable(f"{key} is not valid JSON: {error}", 200)) from error
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [child for each in level for child in _children(each)]
        if not level:
            return value
    raise ValueError(f"{key} is nested more than {_MAX_DEPTH} levels deep")


def _finite(number: str) -> float | str:
    value = float(number)
    return value if math.isfinite(value) else number


def _children(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _check_base(base: BaseInfo) -> None:
    """Check what the field types do not: names become module names, and all values are shown in messages."""
    if len(base.sites) > _MAX_SITES:
        raise ValueError(f"the base has {len(base.sites)} sites, but the limit is {_MAX_SITES}")
    for name in base.sites:
        if not is_dotted_name(name):
            raise ValueError(f"`{printable(name, 40)}` is not a site name")
    for name, encoder in base.text.items():
        for step in (name, *encoder.linears):
            if not is_dotted_name(step):
                raise ValueError(f"`{printable(step, 40)}` is not a name of a text encoder or its layers")
    layers = sum(encoder.num_hidden_layers * len(encoder.linears) for encoder in base.text.values())
    if layers > _MAX_SITES:
        raise ValueError(f"the text encoders have {layers} linear layers, but the limit is {_MAX_SITES}")
    # Lists are shown by `repr`, which escapes their items.
    shown = [base.denoiser, *base.structure, *(each for each in base.structure.values() if isinstance(each, str))]
    if not all(map(str.isprintable, shown)):
        raise ValueError(f"{BASE_KEY} contains control characters")


def _empty_tuner(path: Path, configs: tuple[PartConfig, ...], base: BaseInfo, metadata: Mapping[str, str]) -> Tuner:
    from ..tuners.tuner import Tuner

    try:
        return Tuner.empty(configs, base, metadata)
    # All exceptions that Python and torch raise for untrusted names and numbers that do not form a module.
    except (
        RestuneError, ValueError, RuntimeError, AssertionError, LookupError, AttributeError, TypeError, ArithmeticError
    ) as error:  # fmt: skip
        reason = printable(str(error).rstrip(".") or "it selects no site", 200)
        raise TunerFileError(
            f"{path} has a config that does not fit its base: {reason}; get the file again."
        ) from error


def _read_tensor_entries(
    path: Path, file: safe_open, expected: Container[str]
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Read shape and dtype of every tensor, after checking that all of them are expected."""
    keys: list[str] = file.keys()
    for key in keys:
        if key not in expected:
            raise TunerFileError(f"{path} is damaged: {_not_in_config(key)}; get the file again.")
    return _tensor_entries(file)


def _not_in_config(key: str) -> str:
    return f"its config has no tensor `{printable(key, 80)}`"


def _tensor_entries(file: safe_open) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
    shapes = {key: tuple(piece.get_shape()) for key, piece in slices.items()}
    return shapes, {key: str(piece.get_dtype()) for key, piece in slices.items()}


def _check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the file's tensors with those of its config; raise `ValueError` for the first difference."""
    if not expected:
        raise ValueError("its config has no tensors")
    for key, shape in expected.items():
        if found.get(key) != shape:
            actual = printable(f"shape {found[key]}", 60) if key in found else "no such tensor"
            raise ValueError(f"its config needs `{printable(key, 80)}` of shape {shape}, but it contains {actual}")
