"""LoRA layout of kohya's sd-scripts, also of LyCORIS, A1111 and ComfyUI: `lora_unet_<module with underscores>`.

Source: diffusers' converter (`diffusers/loaders/lora_conversion_utils.py`, 0.42.1). Each module has
`lora_down.weight`, `lora_up.weight` and a scalar `alpha`; without alpha the factor is one. Trainers of Stable
Diffusion XL use the module names of the original U-Net, all others those of diffusers; both are read for every base.
LyCORIS (lycoris-lora 4.1.3) writes the tensors of LoHa, LoKr and others under the same names, or under `lycoris_`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save

from ..backbones import BaseInfo
from ..tuners.tuner import Tuner
from ..utils.atomic_write import atomic_write
from .foreign import ForeignFile, foreign_metadata
from .lora_folding import LoraLayer
from .lora_layers import layers_of, lora_layers, lora_tuner
from .names import underscored_name, underscored_names, weight_shapes
from .products.families import TENSORS
from .products.options import ImportOptions

_KEY = re.compile(rf"(?=(?:lora|lycoris)_[^.]+\.){TENSORS.pattern}")
_SHARED = ("modelspec.title", "modelspec.author", "modelspec.description", "modelspec.license", "modelspec.tags",
           "modelspec.trigger_phrase", "modelspec.usage_hint", "modelspec.thumbnail")  # fmt: skip
_DEFAULTS = ImportOptions()


def recognizes(keys: Iterable[str]) -> bool:
    """Return whether the keys are those of a LoRA in kohya's layout."""
    return any(_KEY.fullmatch(key) for key in keys)


def read(file: ForeignFile, base: BaseInfo, options: ImportOptions = _DEFAULTS) -> Tuner:
    """Convert a LoRA file to a tuner.

    Args:
        file: the file's content.
        base: structure of the base that the file was trained for.
        options: what to skip, and the limit of the rank.

    Raises:
        TunerFileError: if the file also tunes unsupported modules, or is for a base of another structure.
    """
    matches = {key: match for key in file.tensors if (match := _KEY.fullmatch(key))}
    file.refuse_others(matches, "a LoRA of kohya's sd-scripts", options.partial)
    sites, shapes = underscored_names(base), weight_shapes(base)
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, match in matches.items():
        modules.setdefault(match["module"], {})[match["tensor"]] = file.tensors[key]
    found = {
        name: options.layer(tensors, sites[name], shapes[sites[name]], f"{file.path} at `{name}`")
        for name, tensors in modules.items()
        if name in sites
    }
    placed = layers_of(file, found, sites, [name for name in modules if name not in sites], options.partial)
    return lora_tuner(placed, base, foreign_metadata(file), str(file.path))


def write(tuner: Tuner, path: Path) -> None:
    """Write a tuner with only LoRA in kohya's layout.

    Args:
        tuner: tuner to write; for Stable Diffusion XL the modules get the names of the original U-Net.
        path: path of the file.

    Raises:
        TunerFileError: if the tuner contains anything but LoRA, or the file cannot be written.
    """
    layers, shapes = lora_layers(tuner), weight_shapes(tuner.base)
    tensors: dict[str, torch.Tensor] = {}
    for site, layer in layers.items():
        name = underscored_name(site, tuner.base)
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = layer.halves(shapes[site])
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


def _alpha_tensor(layer: LoraLayer) -> torch.Tensor:
    """Return alpha in the weights' dtype, as sd-scripts stores it, or in fp32 if that dtype cannot represent it."""
    alpha = torch.tensor(layer.alpha, dtype=layer.up.dtype)
    return alpha if alpha.item() == layer.alpha else torch.tensor(layer.alpha, dtype=torch.float32)
