"""LoRA layout of diffusers' `load_lora_weights` and `save_lora_weights`.

Source: diffusers 0.42.1 (`loaders/lora_base.py`, `loaders/peft.py`) and PEFT 0.21.2. Files are written in the current
form, `unet.<module>.lora_A.weight` and `.lora_B.weight`, with ranks and alphas in the header's
`lora_adapter_metadata`. Older forms are read too: `<module>.lora.down.weight`,
`<attention>.processor.to_q_lora.down.weight`, and the files of PEFT, ms-swift and SCEPTER with `adapter_config.json`;
SCEPTER uses the module names of the original U-Net.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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

_HEADER = "lora_adapter_metadata"
_ROOTS = ("unet.", "base_model.model.", "model.")
_HALF = {"A": "down", "B": "up", "down": "down", "up": "up"}
_FORMS = (
    re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(?:\.[^.]+)?\.weight"),
    re.compile(r"(?P<module>.+)\.lora\.(?P<half>down|up)\.weight"),
    re.compile(r"(?P<attention>.+)\.processor\.(?P<linear>to_(?:q|k|v|out))_lora\.(?P<half>down|up)\.weight"),
)
_ALPHA = re.compile(r"(?P<module>.+)\.alpha")
# PEFT settings that make a LoRA more than a low-rank product, each with the value of plain LoRA.
_PLAIN = {"use_dora": False, "lora_bias": False, "use_qalora": False, "use_qa_lora": False, "use_merged_linear": False,
          "bias": "none", "modules_to_save": None}  # fmt: skip


def recognizes(keys: Iterable[str]) -> bool:
    """Return whether the keys are those of a LoRA in one of diffusers' layouts."""
    return any(_match(key) for key in keys)


def read(file: ForeignFile, base: BaseInfo, partial: bool = False) -> Tuner:
    """Convert a LoRA file to a tuner.

    Args:
        file: the file's content.
        base: structure of the base that the file was trained for.
        partial: skip modules that no tuner supports, with a warning, instead of raising an error.

    Raises:
        TunerFileError: if the file also tunes unsupported modules, or is for a base of another structure.
    """
    halves: dict[str, dict[str, str]] = {}
    for key in file.tensors:
        if half := _match(key):
            halves.setdefault(half[0], {})[half[1]] = key
    alphas = {match["module"]: key for key in file.tensors if (match := _ALPHA.fullmatch(key))}
    known = [key for keys in halves.values() for key in keys.values()] + list(alphas.values())
    file.refuse_others(known, "a LoRA of diffusers")
    sites = linear_paths(base)
    sites |= {sgm_path(path, layers_per_block(base)[0]): site for path, site in sites.items()}
    settings = _settings(file)
    found = {}
    for module, keys in halves.items():
        path = _strip(module)
        if path in sites:
            found[path] = _layer(file, keys, path, alphas.get(module), settings)
    others = [module for module in halves if _strip(module) not in sites]
    return lora_tuner(layers_of(file, found, sites, others, partial), base, foreign_metadata(file), str(file.path))


def write(tuner: Tuner, path: Path) -> None:
    """Write a tuner with only LoRA in the layout that `pipe.load_lora_weights` reads.

    Args:
        tuner: tuner to write.
        path: path of the file.

    Raises:
        TunerFileError: if the tuner contains anything but LoRA, or the file cannot be written.
    """
    layers = {module_path(site): layer for site, layer in lora_layers(tuner).items()}
    tensors: dict[str, torch.Tensor] = {}
    for module, layer in layers.items():
        tensors[f"unet.{module}.lora_A.weight"] = layer.down
        tensors[f"unet.{module}.lora_B.weight"] = layer.up
    whole = max(layers.values(), key=lambda layer: layer.rank)
    settings = {
        "r": whole.rank,
        "lora_alpha": whole.alpha,
        "target_modules": list(layers),
        "rank_pattern": {module: layer.rank for module, layer in layers.items() if layer.rank != whole.rank},
        "alpha_pattern": {module: layer.alpha for module, layer in layers.items() if layer.alpha != whole.alpha},
    }
    header = {"format": "pt", _HEADER: json.dumps({f"unet.{key}": value for key, value in settings.items()})}
    with atomic_write(path) as file:
        file.write(save(tensors, header))


def _match(key: str) -> tuple[str, str] | None:
    """Return the module of a key, and the factor of the product (`down` or `up`)."""
    for form in _FORMS:
        if match := form.fullmatch(key):
            parts = match.groupdict()
            linear = {"to_out": "to_out.0"}.get(parts.get("linear") or "", parts.get("linear"))
            return parts.get("module") or f"{parts['attention']}.{linear}", _HALF[parts["half"]]
    return None


def _strip(module: str) -> str:
    for root in _ROOTS:
        module = module.removeprefix(root)
    return module


def _layer(
    file: ForeignFile, keys: dict[str, str], path: str, alpha_key: str | None, settings: dict[str, Any]
) -> LoraLayer:
    if keys.keys() != {"down", "up"}:
        raise TunerFileError(f"{file.path} is damaged: `{path}` has only one of its two weights.")
    down, up = file.tensors[keys["down"]], file.tensors[keys["up"]]
    if alpha_key is not None:
        alpha = file.tensors[alpha_key]
        if alpha.numel() != 1:
            raise TunerFileError(f"{file.path} is damaged: `{alpha_key}` has {alpha.numel()} values.")
        return LoraLayer(down, up, alpha.item())
    if not settings:
        return LoraLayer(down, up, float(down.shape[0]))
    value = _for_module(settings.get("alpha_pattern") or {}, path, settings.get("lora_alpha"), file)
    # rsLoRA divides by the root of the rank (arXiv 2312.03732).
    return LoraLayer(down, up, value * math.sqrt(down.shape[0]) if settings.get("use_rslora") else value)


def _settings(file: ForeignFile) -> dict[str, Any]:
    """Return PEFT's settings for the U-Net, from the header or from `adapter_config.json`."""
    settings = file.settings
    if _HEADER in file.metadata:
        try:
            header = json.loads(file.metadata[_HEADER])
            settings = {key.removeprefix("unet."): value for key, value in header.items() if key.startswith("unet.")}
        except (ValueError, AttributeError, RecursionError) as error:
            raise TunerFileError(f"{file.path} is damaged: its {_HEADER} is not a JSON object.") from error
    for key, plain in _PLAIN.items():
        if settings.get(key) not in (plain, None):
            raise TunerFileError(
                f"{file.path} was trained with {key} = {repr(settings[key])[:40]}, which no tuner family supports."
            )
    return settings


def _for_module(pattern: dict[str, Any], path: str, default: object, file: ForeignFile) -> float:
    """Return the setting of a module from a PEFT pattern, or the default."""
    if not isinstance(pattern, dict):
        raise TunerFileError(f"{file.path} is damaged: its alpha_pattern is not a JSON object.")
    value = default
    for name, own in pattern.items():
        # PEFT interprets the keys as regular expressions; diffusers writes plain names.
        plain = name.removeprefix("^").replace("\\.", ".")
        if path == plain or (not name.startswith("^") and path.endswith(f".{plain}")):
            value = own
            break
    # A Python integer may exceed the range of a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e30:
        raise TunerFileError(f"{file.path} is damaged: its alpha is {repr(value)[:40]}.")
    return float(value)
