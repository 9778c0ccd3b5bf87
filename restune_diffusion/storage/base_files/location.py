"""Tell a local base from a repository on the Hub; the location of the bundled base."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ...utils.errors import RestuneError

BUNDLED_BASE = Path(__file__).parents[2] / "assets" / "restune-tiny"
"""Folder of the small base that the package brings."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
_FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def is_hub_id(text: str) -> bool:
    """Return whether a text can only be a repository id on the Hub: `name/name`, and no path on this machine.

    A mistyped path must not cause a network call: text that starts with `.`, `~` or `/`, that ends with the suffix of
    a weight file, or whose first part is a local folder, is a path.
    """
    if not _HUB_ID.fullmatch(text) or text.lower().endswith(_FILE_SUFFIXES):
        return False
    return not Path(text).parent.is_dir()


def local_base(base: str, *, needs_index: bool = True) -> Path | None:
    """Return the local path of a base, or None for a repository id on the Hub.

    Args:
        base: a path or a repository id.
        needs_index: whether a folder must hold a whole pipeline, with its `model_index.json`.

    Raises:
        RestuneError: if there is nothing at the path, or a folder is not a pipeline in diffusers' layout.
    """
    path = Path(base).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if needs_index and not (path / "model_index.json").is_file():
            raise RestuneError(_why_not_a_base(base, path))
        return path
    if is_hub_id(base):
        return None
    raise RestuneError(
        f"There is no base at {base}; give a folder in diffusers' format, a safetensors file, or a repository id on "
        "the Hub."
    )


def _why_not_a_base(base: str, path: Path) -> str:
    start = f"The base {base} is a folder without a `model_index.json`"
    if (path / "adapter_config.json").is_file():
        return f"{start}; it holds a LoRA of PEFT. Give the checkpoint that the LoRA belongs to."
    config = path / "config.json"
    if config.is_file():
        try:
            kind = json.loads(config.read_text(encoding="utf-8")).get("_class_name") or "a single model"
        except (ValueError, AttributeError):
            kind = "a damaged config"
        return f"{start}; it holds {kind}. Give the folder of the whole pipeline, one level up."
    found = sorted(child.name for child in path.iterdir() if child.suffix == ".safetensors")
    if found:
        return f"{start}; name one of its files as the base: {', '.join(found[:5])}."
    return f"{start}; give a folder in diffusers' format."


def public_name(source: str) -> str:
    """Return an id on the Hub, or the last part of a path: files that are shared must not reveal private paths.

    The folder of a component, such as `sd/vae`, has the name of its pipeline too.
    """
    path = Path(source).expanduser()
    if not path.exists():
        return source
    path = path.resolve()
    return f"{path.parent.name}/{path.name}" if path.name == "vae" and path.parent.name else path.name
