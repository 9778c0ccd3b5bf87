"""Find the packages of the extra `evaluate` and the weight files inside them."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

from ..utils.errors import RestuneError

_INSTALL = "install it with: pip install 'restune-diffusion[evaluate]'"


def require_package(package: str) -> None:
    """Raise an error if a package is not installed.

    Raises:
        RestuneError: if the package is not installed; the message has the install command.
    """
    if find_spec(package) is None:
        raise RestuneError(f"Evaluation needs the package {package.replace('_', '-')}; {_INSTALL}.")


def packaged_file(package: str, name: str, sha256: str) -> Path:
    """Return the path of a file inside an installed package, without importing the package.

    Args:
        package: import name of the package.
        name: path of the file inside it.
        sha256: expected SHA-256 of the file, in hex.

    Raises:
        RestuneError: if the package is missing, or the file has another hash.
    """
    require_package(package)
    # Importing these packages would also import OpenCV or JAX, which are not needed.
    spec = find_spec(package)
    folders = (spec.submodule_search_locations if spec is not None else None) or []
    path = next((Path(folder) / name for folder in folders if (Path(folder) / name).is_file()), None)
    if path is None:
        raise RestuneError(f"The package {package} has no {name}; {_INSTALL}.")
    with path.open("rb") as file:
        # `hashlib.file_digest` came with Python 3.11.
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise RestuneError(f"{path} is damaged or of an unsupported version (its SHA-256 differs); {_INSTALL}.")
    return path
