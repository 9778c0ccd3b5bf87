"""Names and shapes of the tensors in a safetensors file, read without torch and without the tensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...utils.errors import RestuneError

# The limit of the safetensors format.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorHeader:
    """Header of a safetensors file.

    Attributes:
        path: path of the file.
        shapes: shape of every tensor, by name.
        metadata: texts that the program that wrote the file added.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]

    def has(self, *prefixes: str) -> bool:
        """Return whether the name of some tensor starts with one of the prefixes."""
        return any(name.startswith(prefixes) for name in self.shapes)


def read_tensor_header(path: Path) -> TensorHeader:
    """Read the header of a safetensors file.

    Raises:
        RestuneError: if the file cannot be read, or is not a complete safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, MAX_HEADER_BYTES):
                raise ValueError("the header is longer than the file")
            entries = json.loads(file.read(length))
        metadata = entries.pop("__metadata__", {})
        shapes = {name: tuple(int(side) for side in entry["shape"]) for name, entry in entries.items()}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except OSError as error:
        raise RestuneError(f"The file {path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error, RecursionError) as error:
        raise RestuneError(f"{path} is not a safetensors file, or its header is damaged.") from error
    if 8 + length + end > size:
        raise RestuneError(f"{path} is cut off: it has {size} of {8 + length + end} bytes; download it again.")
    return TensorHeader(path, shapes, {str(name): str(value) for name, value in metadata.items()})
