"""The LoRA layout that diffusers' `load_lora_weights` reads and `save_lora_weights` writes.

Read in diffusers 0.42.1 (`loaders/lora_base.py`, `loaders/peft.py`) and PEFT 0.21.2. Written is the present form,
`unet.<module>.lora_A.weight` and `.lora_B.weight`, with ranks and alphas in the header's `lora_adapter_metadata`. Read
are the older forms too: `<module>.lora.down.weight`, `<attention>.processor.to_q_lora.down.weight`, and the files of
PEFT, ms-swift and SCEPTER with `adapter_config.json`; the last name the modules as the original U-Net does.
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
# Settings of PEFT under which a LoRA is more than a low-rank product, and the value that means it is not.
_PLAIN = {"use_dora": False, "lora_bias": False, "use_qalora": False, "use_qa_lora": False, "use_merged_linear": False,
          "bias": "none", "modules_to_save": None}  # fmt: skip


def recognises(keys: Iterable[str]) -> bool:
    """Say whether a file with these keys is a LoRA in one of diffusers' layouts."""
    return any(_match(key) for key in keys)


def read(file: ForeignFile, base: BaseInfo, partial: bool = False) -> Tuner:
    """Make a tuner of a LoRA file.

    Args:
        file: what was read.
        base: structure of the base that it is for.
        partial: leave out modules on which no tuner acts, with a warning.

    Raises:
        TunerFileError: if it tunes other modules too, or is for a base of another structure.
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
    """Write a tuner of lora alone as `pipe.load_lora_weights` takes it.

    Args:
        tuner: what to write.
        path: the file.

    Raises:
        TunerFileError: if the tuner does anything else, or the file cannot be written.
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
    """Return the module and the half of the product that a key names."""
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
        raise TunerFileError(f"{file.path} is damaged: of `{path}` it has only one half.")
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
    """Return PEFT's settings for the U-Net, from the header or from the file beside it."""
    settings = file.settings
    if _HEADER in file.metadata:
        try:
            header = json.loads(file.metadata[_HEADER])
            settings = {key.removeprefix("unet."): value for key, value in header.items() if key.startswith("unet.")}
        except (ValueError, AttributeError, RecursionError) as error:
            raise TunerFileError(f"{file.path} is damaged: its {_HEADER} is no JSON object.") from error
    for key, plain in _PLAIN.items():
        if settings.get(key) not in (plain, None):
            raise TunerFileError(
                f"{file.path} was trained with {key} = {repr(settings[key])[:40]}, which no part here computes."
            )
    return settings


def _for_module(pattern: dict[str, Any], path: str, default: object, file: ForeignFile) -> float:
    """Return a module's own setting, or the common one."""
    if not isinstance(pattern, dict):
        raise TunerFileError(f"{file.path} is damaged: its alpha_pattern is no JSON object.")
    value = default
    for name, own in pattern.items():
        # PEFT takes these as regular expressions; those that diffusers writes are names.
        plain = name.removeprefix("^").replace("\\.", ".")
        if path == plain or (not name.startswith("^") and path.endswith(f".{plain}")):
            value = own
            break
    # Python's integers have no bound, numbers that compute have.
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e30:
        raise TunerFileError(f"{file.path} is damaged: its alpha is {repr(value)[:40]}.")
    return float(value)
