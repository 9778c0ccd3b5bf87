"""Tensors of a checkpoint by component and name in diffusers' format, read one at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors import SafetensorError, safe_open

from ...backbones import BaseInfo
from ...storage.base_files.contents import CLIP, CLIP_G, CLIP_L, OPEN_CLIP, UNET, is_whole_checkpoint
from ...storage.base_files.location import local_base
from ...storage.base_files.tensor_header import TensorHeader, read_tensor_header
from ...utils.errors import RestuneError
from ..names import layers_per_block
from .open_clip import open_clip_places
from .place import Place

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_NAMES = ("diffusion_pytorch_model", "model")
_PREFIX = "text_model."
_PIECES = ("down_blocks.", "mid_block.", "up_blocks.", "conv_", "time_embedding.", "add_embedding.")


@dataclass
class Checkpoint:
    """Tensors of a checkpoint; use it as a context manager, which keeps its files open.

    Attributes:
        name: path or id, for messages.
        places: place of each tensor, by component and name.
    """

    name: str
    places: Mapping[str, Mapping[str, Place]]

    def __post_init__(self) -> None:
        self._stack = ExitStack()
        self._opened: dict[Path, Any] = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read(self, component: str, name: str) -> torch.Tensor:
        """Return a tensor.

        Raises:
            RestuneError: if the file is damaged.
        """
        place = self.places[component][name]
        try:
            if place.file not in self._opened:
                self._opened[place.file] = self._stack.enter_context(safe_open(place.file, framework="pt"))
            return place.of(self._opened[place.file].get_tensor(place.key))
        except (SafetensorError, OSError) as error:
            raise RestuneError(f"{place.file} cannot be read ({error}); download it again.") from error


def open_checkpoint(source: str, base: BaseInfo) -> Checkpoint:
    """Return the tensors of a checkpoint.

    Args:
        source: a folder in diffusers' format, the folder of a U-Net, a safetensors file, or a repository on the Hub.
        base: structure that the checkpoint has.

    Raises:
        RestuneError: if it has no U-Net in safetensors files, or is of another structure.
    """
    path = local_base(source, needs_index=False) or _downloaded(source)
    places = _of_file(path, base) if path.is_file() else _of_folder(path)
    if not places.get("unet"):
        raise RestuneError(
            f"{source} has no weights of a U-Net in safetensors files; give a folder in diffusers' format or a "
            "safetensors checkpoint."
        )
    return Checkpoint(source, places)


def _downloaded(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    files = [
        f"{component}/{name}{rest}"
        for component in COMPONENTS
        for name in _NAMES
        for rest in (".safetensors", ".safetensors.index.json", "-0*.safetensors")
    ]
    try:
        return Path(snapshot_download(repository, allow_patterns=files))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RestuneError(f"The weights of {repository} cannot be loaded from the Hub: {reason}") from error


def _of_folder(folder: Path) -> dict[str, dict[str, Place]]:
    found = {}
    for component in COMPONENTS:
        # The U-Net's own folder is accepted too.
        places = [folder / component, *([folder] if component == "unet" else [])]
        files = next((files for place in places if (files := _weight_files(place))), [])
        found[component] = {
            key.removeprefix(_PREFIX): Place(file, key) for file in files for key in read_tensor_header(file).shapes
        }
    return found


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model: one, or those of an index; full precision comes before fp16."""
    for variant in ("", ".fp16"):
        for name in _NAMES:
            single = folder / f"{name}{variant}.safetensors"
            if single.is_file():
                return [single]
            index = folder / f"{name}.safetensors.index{variant}.json"
            if index.is_file():
                return _of_index(index)
    return []


def _of_index(index: Path) -> list[Path]:
    try:
        names = {str(name) for name in json.loads(index.read_text("utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RestuneError(f"{index} is damaged; download it again.") from error
    files = [index.parent / Path(name).name for name in sorted(names)]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise RestuneError(f"{missing[0]} is missing; download the checkpoint again.")
    return files


def _of_file(path: Path, base: BaseInfo) -> dict[str, dict[str, Place]]:
    header = read_tensor_header(path)
    if not is_whole_checkpoint(header):
        # A U-Net alone in diffusers' format.
        return {"unet": {key: Place(path, key) for key in header.shapes if key.startswith(_PIECES)}}
    texts = (("text_encoder", CLIP), ("text_encoder", CLIP_L), ("text_encoder", OPEN_CLIP), ("text_encoder_2", CLIP_G))
    found = {"unet": _ldm_unet(header, base)}
    for component, prefix in texts:
        if not header.has(prefix):
            continue
        if prefix in (OPEN_CLIP, CLIP_G):
            found[component] = open_clip_places(header, prefix)
        else:
            keys = [key for key in header.shapes if key.startswith(prefix)]
            found[component] = {key.removeprefix(prefix): Place(path, key) for key in keys}
    return found


def _ldm_unet(header: TensorHeader, base: BaseInfo) -> dict[str, Place]:
    """Return the place of each tensor of the U-Net of a file in the original layout, by diffusers' names."""
    config = {
        "layers_per_block": layers_per_block(base)[0],
        "addition_embed_type": "text_time" if header.has(f"{UNET}label_emb.") else None,
    }
    try:
        # The names are translated alone: a key stands in the place of its tensor.
        names = convert_ldm_unet_checkpoint({key: key for key in header.shapes if key.startswith(UNET)}, config)
    except (KeyError, IndexError, TypeError, ValueError):
        return {}
    return {name: Place(header.path, key) for name, key in names.items() if key is not None}
