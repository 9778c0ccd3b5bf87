"""LoRA layout of kohya's sd-scripts, also read by ComfyUI and A1111: `lora_unet_<module with underscores>`.

Source: diffusers' converter (`diffusers/loaders/lora_conversion_utils.py`, 0.42.1). Each module has
`lora_down.weight`, `lora_up.weight` and a scalar `alpha`; without alpha the factor is one. Trainers of Stable
Diffusion XL use the module names of the original U-Net, all others those of diffusers; both are read for every base.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save

from ..backbones import BaseInfo, module_path
from ..tuners.tuner import Tuner
from ..utils.atomic_write import atomic_write
from ..utils.errors import TunerFileError
from .foreign import ForeignFile, foreign_metadata
from .lora_folding import LoraLayer
from .lora_layers import layers_of, lora_layers, lora_tuner
from .names import layers_per_block, linear_paths, sgm_path

_KEY = re.compile(r"(?P<name>lora_[^.]+)\.(?P<tensor>lora_down\.weight|lora_up\.weight|alpha)")
_SHARED = ("modelspec.title", "modelspec.author", "modelspec.description", "modelspec.license", "modelspec.tags",
           "modelspec.trigger_phrase", "modelspec.usage_hint", "modelspec.thumbnail")  # fmt: skip


def recognizes(keys: Iterable[str]) -> bool:
    """Return whether the keys are those of a LoRA in kohya's layout."""
    return any(_KEY.fullmatch(key) for key in keys)


def read(file: ForeignFile, base: BaseInfo, partial: bool = False) -> Tuner:
    """Convert a LoRA file to a tuner.

    Args:
        file: the file's content.
        base: structure of the base that the file was trained for.
        partial: skip modules that no tuner supports, with a warning, instead of raising an error.

    Raises:
        TunerFileError: if the file also tunes unsupported modules, or is for a base of another structure.
    """
    matches = {key: match for key in file.tensors if (match := _KEY.fullmatch(key))}
    file.refuse_others(matches, "a LoRA of kohya's sd-scripts")
    sites = {_name(path): site for path, site in linear_paths(base).items()}
    sites |= {_name(sgm_path(path, layers_per_block(base)[0])): site for path, site in linear_paths(base).items()}
    names = dict.fromkeys(match["name"] for match in matches.values())
    found = {name: _layer(file, name) for name in names if name in sites}
    placed = layers_of(file, found, sites, [name for name in names if name not in sites], partial)
    return lora_tuner(placed, base, foreign_metadata(file), str(file.path))


def write(tuner: Tuner, path: Path) -> None:
    """Write a tuner with only LoRA in kohya's layout.

    Args:
        tuner: tuner to write; for Stable Diffusion XL the modules get the names of the original U-Net.
        path: path of the file.

    Raises:
        TunerFileError: if the tuner contains anything but LoRA, or the file cannot be written.
    """
    layers = lora_layers(tuner)
    tensors: dict[str, torch.Tensor] = {}
    for site, layer in layers.items():
        path_there = module_path(site)
        if _is_xl(tuner.base):
            path_there = sgm_path(path_there, layers_per_block(tuner.base)[0])
        name = _name(path_there)
        tensors[f"{name}.lora_down.weight"] = layer.down
        tensors[f"{name}.lora_up.weight"] = layer.up
        tensors[f"{name}.alpha"] = _alpha_tensor(layer)
    whole = max(layers.values(), key=lambda layer: layer.rank)
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(whole.rank),
        "ss_network_alpha": str(whole.alpha),
        **{key: value for key, value in tuner.metadata.items() if key.startswith("ss_") or key in _SHARED},
        "format": "pt",
    }
    with atomic_write(path) as file:
        file.write(save(tensors, header))


def _name(path: str) -> str:
    return "lora_unet_" + path.replace(".", "_")


def _is_xl(base: BaseInfo) -> bool:
    """Return whether a base is Stable Diffusion XL, whose first level has no attention, unlike 1.x and 2.x."""
    return base.structure.get("down_block_types", [None])[0] == "DownBlock2D"


def _layer(file: ForeignFile, name: str) -> LoraLayer:
    down, up = file.tensors.get(f"{name}.lora_down.weight"), file.tensors.get(f"{name}.lora_up.weight")
    if down is None or up is None:
        raise TunerFileError(f"{file.path} is damaged: `{name}` has only one of its two weights.")
    alpha = file.tensors.get(f"{name}.alpha")
    if alpha is not None and alpha.numel() != 1:
        raise TunerFileError(f"{file.path} is damaged: `{name}.alpha` has {alpha.numel()} values.")
    return LoraLayer(down, up, float(down.shape[0]) if alpha is None else alpha.item())


def _alpha_tensor(layer: LoraLayer) -> torch.Tensor:
    """Return alpha in the weights' dtype, as sd-scripts stores it, or in fp32 if that dtype cannot represent it."""
    alpha = torch.tensor(layer.alpha, dtype=layer.up.dtype)
    return alpha if alpha.item() == layer.alpha else torch.tensor(layer.alpha, dtype=torch.float32)
