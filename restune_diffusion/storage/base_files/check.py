"""Check a base and a VAE by their configs and headers, without torch and without the network."""

from __future__ import annotations

import json
from pathlib import Path

from ...utils.errors import RestuneError
from .contents import SUPPORTED, family_of
from .location import local_base
from .tensor_header import read_tensor_header
from .vae_location import locate_vae

_PIPELINES = {
    f"{prefix}StableDiffusion{size}{task}Pipeline"
    for prefix in ("", "Restune")
    for size in ("", "XL")
    for task in ("", "Inpaint")
}


def check_base(base: str, vae: str | None = None) -> None:
    """Check that a base that is on this machine can be loaded; an id on the Hub is not looked up.

    Args:
        base: a directory, a safetensors file, or a repository id.
        vae: VAE that replaces that of the base.

    Raises:
        RestuneError: if there is nothing at the path, or something else than a base; the message names it.
    """
    path = local_base(base)
    if path is not None and path.is_file():
        check_suffix(path)
        family_of(read_tensor_header(path), has_vae=vae is not None)
    elif path is not None:
        check_class(base, _class_name(base, path))
    if vae is not None:
        locate_vae(vae)


def check_suffix(path: Path) -> None:
    """Raise `RestuneError` if a base in one file is not a safetensors file."""
    if path.suffix.lower() != ".safetensors":
        raise RestuneError(
            f"The base {path} is not a safetensors file; a {path.suffix or 'file of this type'} can run code when it "
            "is read. Convert it to safetensors with a program that you trust."
        )


def check_class(base: str, class_name: str) -> None:
    """Raise `RestuneError` if the pipeline class of a folder or repository is not supported."""
    if class_name not in _PIPELINES:
        raise RestuneError(f"The base {base} is a {class_name}; give {SUPPORTED}.")


def _class_name(base: str, folder: Path) -> str:
    try:
        return str(json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RestuneError(
            f"The base {base} cannot be loaded: its `model_index.json` is damaged; download it again."
        ) from error
