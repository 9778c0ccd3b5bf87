"""Place of a VAE that replaces that of the base: a folder, one file, or a repository on the Hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ...utils.errors import RestuneError
from .contents import check_is_vae
from .location import is_hub_id
from .tensor_header import TensorHeader, read_tensor_header

_CLASS = "AutoencoderKL"
_WANTED = "a folder of an AutoencoderKL in diffusers' format, a safetensors file, or a repository id on the Hub"


@dataclass(frozen=True)
class VaeLocation:
    """Place of a VAE.

    Attributes:
        source: folder in diffusers' format, or id on the Hub; None for a file without a config.
        header: header of a file without a config.
    """

    source: str | None
    header: TensorHeader | None = None


def locate_vae(vae: str) -> VaeLocation:
    """Return the place of a VAE, after checking by config and header that it is one.

    Args:
        vae: a path or a repository id.

    Raises:
        RestuneError: if there is nothing at the path, or something else than an autoencoder.
    """
    path = Path(vae).expanduser()
    if path.is_dir():
        _check_folder(vae, path)
        return VaeLocation(str(path))
    if path.is_file():
        if path.suffix.lower() != ".safetensors":
            raise RestuneError(
                f"The VAE {vae} is not a safetensors file; a {path.suffix or 'file of this type'} can run code when "
                "it is read. Convert it to safetensors with a program that you trust."
            )
        header = read_tensor_header(path)
        check_is_vae(header)
        if path.name.startswith("diffusion_pytorch_model.") and (path.parent / "config.json").is_file():
            _check_folder(vae, path.parent)
            return VaeLocation(str(path.parent))
        return VaeLocation(None, header)
    if is_hub_id(vae):
        return VaeLocation(vae)
    raise RestuneError(f"There is no VAE at {vae}; give {_WANTED}.")


def _check_folder(vae: str, folder: Path) -> None:
    if (folder / "model_index.json").is_file():
        raise RestuneError(f"The VAE {vae} is a whole pipeline; give the folder of its VAE, {folder / 'vae'}.")
    config = folder / "config.json"
    if not config.is_file():
        found = sorted(child.name for child in folder.iterdir() if child.suffix == ".safetensors")
        hint = f"name one of its files: {', '.join(found[:5])}" if found else f"give {_WANTED}"
        raise RestuneError(f"The VAE {vae} is a folder without a `config.json`; {hint}.")
    try:
        kind = json.loads(config.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = "a model without a class in its config"
    check_vae_class(vae, kind)


def check_vae_class(vae: str, kind: object) -> None:
    """Raise `RestuneError` if the class in the config of a VAE is not the supported one."""
    if kind != _CLASS:
        raise RestuneError(f"The VAE {vae} is {_article(str(kind))}; give an {_CLASS} of Stable Diffusion.")


def _article(kind: str) -> str:
    return kind if kind.startswith("a ") else f"{'an' if kind[:1] in 'AEIO' else 'a'} {kind}"
