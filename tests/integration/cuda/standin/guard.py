"""Build and load the C++ part of the stand-in. This module must not import torch."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
_loaded = False


def compiler() -> str | None:
    """Return the path of the C++ compiler, or None if there is none."""
    return shutil.which("g++") or shutil.which("c++")


def compiled_guard(folder: Path | None = None) -> Path:
    """Compile the guard for the installed torch, unless the folder contains it, and return the library's path.

    Args:
        folder: folder of the library; by default one in the folder for temporary files.

    Raises:
        RuntimeError: if there is no compiler, or it fails.
    """
    found = compiler()
    if found is None:
        raise RuntimeError("The stand-in for CUDA needs a C++ compiler; install g++.")
    version = importlib.metadata.version("torch")
    key = hashlib.sha256(SOURCE.read_bytes() + f"{version} {_torch()}".encode()).hexdigest()[:16]
    folder = folder or Path(tempfile.gettempdir()) / "restune-cuda-standin"
    library = folder / f"guard-{key}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        # Built aside and moved, because several processes may build it at once.
        built = Path(own) / library.name
        ran = subprocess.run([found, *_flags(), str(SOURCE), "-o", str(built)], capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError(f"The stand-in for CUDA does not compile: {ran.stderr[-2000:]}")
        built.replace(library)
    return library


def load_guard(library: Path) -> None:
    """Load the guard into this process, before torch."""
    global _loaded
    if "torch" in sys.modules:
        raise RuntimeError("The stand-in for CUDA must be loaded before torch is imported.")
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    _loaded = True


def loaded() -> bool:
    """Return whether this process has the guard."""
    return _loaded


def _torch() -> Path:
    # Looked up without an import, which would come before the guard.
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _flags() -> list[str]:
    libraries = _torch() / "lib"
    includes = [_torch() / "include", _torch() / "include" / "torch" / "csrc" / "api" / "include"]
    return [
        *("-shared", "-fPIC", "-std=c++20", "-O0"),
        *(f"-I{include}" for include in includes),
        *(f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-Wl,--no-as-needed", "-lc10", "-ltorch_cpu"),
    ]
