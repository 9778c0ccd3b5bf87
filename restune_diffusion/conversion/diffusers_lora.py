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
from .names import dotted_names, text_path, text_shapes, weight_shapes
from .products.families import TENSORS
from .products.options import ImportOptions
from .reading.peft_settings import check_settings, pattern_key

_HEADER = "lora_adapter_metadata"
# Prefixes of the U-Net and of the whole model, removed in this order, and names of the text encoders in ComfyUI.
_ROOTS = ("base_model.model.", "model.", "diffusion_model.", "unet.", "text_encoders.")
_ENCODERS = {"clip_l.transformer.": "text_encoder.", "clip_g.transformer.": "text_encoder_2.",
             "clip_l.": "text_encoder.", "clip_g.": "text_encoder_2."}  # fmt: skip
_ENCODER_NAMES = ("text_encoder", "text_encoder_2")
_NAMES = {"A": "lora_down.weight", "B": "lora_up.weight", "down": "lora_down.weight", "up": "lora_up.weight"}
_FORMS = (
    re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(?:\.[^.]+)?\.weight"),
    re.compile(r"(?P<module>.+)\.(?:lora|lora_linear_layer)\.(?P<half>down|up)\.weight"),
    re.compile(r"(?P<attention>.+)\.processor\.(?P<linear>to_(?:q|k|v|out))_lora\.(?P<half>down|up)\.weight"),
    re.compile(r"(?P<attention>.+\.self_attn)\.to_(?P<text>q|k|v|out)_lora\.(?P<half>down|up)\.weight"),
    re.compile(r"(?P<module>.+)\.lora_magnitude_vector(?:\.[^.]+)?"),
    # Tensors of LyCORIS; PEFT may add the adapter's name.
    re.compile(rf"(?!(?:lora|lycoris)_[^.]+\.){TENSORS.pattern}(?:\.default)?"),
)
_DEFAULTS = ImportOptions()


def recognizes(keys: Iterable[str]) -> bool:
    """Return whether the keys are those of a LoRA in one of diffusers' layouts."""
    return any(_match(key) for key in keys)


def read(file: ForeignFile, base: BaseInfo, options: ImportOptions = _DEFAULTS) -> Tuner:
    """Convert a LoRA file to a tuner.

    Args:
        file: the file's content.
        base: structure of the base that the file was trained for.
        options: what to skip, and the limit of the rank.

    Raises:
        TunerFileError: if the file also tunes unsupported modules, or is for a base of another structure.
    """
    matches = {key: match for key in file.tensors if (match := _match(key))}
    file.refuse_others(matches, "a LoRA of diffusers", options.partial)
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, (module, tensor) in matches.items():
        value = file.tensors[key]
        if "magnitude" in key and value.dim() > 2:
            # PEFT puts the magnitudes of a convolution's outputs into the second dimension.
            value = value.transpose(0, 1)
        modules.setdefault(_strip(module), {})[tensor] = value
    sites, shapes = dotted_names(base), weight_shapes(base)
    settings = {component: _settings(file, component) for component in ("unet", *_ENCODER_NAMES)}
    found = {
        module: _layer(
            file, tensors, module, sites[module], shapes[sites[module]], settings[_component(module)], options
        )
        for module, tensors in modules.items()
        if module in sites
    }
    placed = layers_of(file, found, sites, [module for module in modules if module not in sites], options.partial)
    return lora_tuner(placed, base, foreign_metadata(file), str(file.path))


def write(tuner: Tuner, path: Path) -> None:
    """Write a tuner with only LoRA in the layout that `pipe.load_lora_weights` reads.

    Args:
        tuner: tuner to write.
        path: path of the file.

    Raises:
        TunerFileError: if the tuner contains anything but LoRA, or the file cannot be written.
    """
    texts, shapes = text_shapes(tuner.base), weight_shapes(tuner.base)
    components: dict[str, dict[str, LoraLayer]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for site, layer in lora_layers(tuner).items():
        component, _, module = text_path(site).partition(".") if site in texts else ("unet", "", module_path(site))
        components.setdefault(component, {})[module] = layer
        down, up = layer.halves(shapes[site])
        tensors |= {f"{component}.{module}.lora_A.weight": down, f"{component}.{module}.lora_B.weight": up}
    settings: dict[str, Any] = {}
    for component, layers in components.items():
        settings |= {f"{component}.{key}": value for key, value in _peft_settings(layers).items()}
    header = {"format": "pt", _HEADER: json.dumps(settings)}
    with atomic_write(path) as file:
        file.write(save(tensors, header))


def _peft_settings(layers: dict[str, LoraLayer]) -> dict[str, Any]:
    """Return the settings of PEFT that describe the ranks and alphas of a component's layers."""
    whole = max(layers.values(), key=lambda layer: layer.rank)
    # PEFT compares the ends of names; the version of transformers decides whether a text encoder has a `text_model`.
    layers = {module.removeprefix("text_model."): layer for module, layer in layers.items()}
    return {
        "r": whole.rank,
        "lora_alpha": whole.alpha,
        "target_modules": list(layers),
        "rank_pattern": {module: layer.rank for module, layer in layers.items() if layer.rank != whole.rank},
        "alpha_pattern": {module: layer.alpha for module, layer in layers.items() if layer.alpha != whole.alpha},
    }


def _match(key: str) -> tuple[str, str] | None:
    """Return the module of a key, and the name of its tensor in `families.TENSORS`."""
    for form in _FORMS:
        if match := form.fullmatch(key):
            parts = match.groupdict()
            module = parts.get("module")
            if module is None:
                linear = parts.get("linear") or f"{parts['text']}_proj"
                module = f"{parts['attention']}.{'to_out.0' if linear == 'to_out' else linear}"
            return module, parts.get("tensor") or _NAMES.get(parts.get("half") or "", "dora_scale")
    return None


def _strip(module: str) -> str:
    for root in _ROOTS:
        module = module.removeprefix(root)
    for theirs, ours in _ENCODERS.items():
        if module.startswith(theirs):
            return ours + module.removeprefix(theirs)
    return module


def _layer(
    file: ForeignFile,
    tensors: dict[str, torch.Tensor],
    path: str,
    site: str,
    shape: tuple[int, ...],
    settings: dict[str, Any],
    options: ImportOptions,
) -> LoraLayer:
    where = f"{file.path} at `{path}`"
    if settings.get("use_dora") and "dora_scale" not in tensors:
        raise TunerFileError(f"{file.path} was trained with use_dora = True, but has no magnitude for `{path}`.")
    if "alpha" in tensors or not settings:
        return options.layer(tensors, site, shape, where)
    if "lora_down.weight" not in tensors:
        # LoHa and LoKr of PEFT.
        alpha = _for_module(settings.get("alpha_pattern") or {}, path, settings.get("alpha"), file)
        rank = _for_module(settings.get("rank_pattern") or {}, path, settings.get("r"), file)
        return options.layer(tensors, site, shape, where, scale=alpha / rank if rank else None)
    rank = tensors["lora_down.weight"].shape[0]
    value = _for_module(settings.get("alpha_pattern") or {}, path, settings.get("lora_alpha"), file)
    # rsLoRA divides by the root of the rank (arXiv 2312.03732).
    return options.layer(
        tensors, site, shape, where, alpha=value * math.sqrt(rank) if settings.get("use_rslora") else value
    )


def _component(module: str) -> str:
    """Return the component of a pipeline that a module belongs to."""
    first = module.partition(".")[0]
    return first if first in _ENCODER_NAMES else "unet"


def _settings(file: ForeignFile, component: str) -> dict[str, Any]:
    """Return PEFT's settings for a component, from the header or from `adapter_config.json`."""
    settings = file.settings
    if _HEADER in file.metadata:
        try:
            header = json.loads(file.metadata[_HEADER])
            prefix = f"{component}."
            settings = {key.removeprefix(prefix): value for key, value in header.items() if key.startswith(prefix)}
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise TunerFileError(f"{file.path} is damaged: its {_HEADER} is not a JSON object.") from error
    check_settings(settings, str(file.path))
    return settings


def _for_module(pattern: dict[str, Any], path: str, default: object, file: ForeignFile) -> float:
    """Return the setting of a module from a PEFT pattern, or the default."""
    if not isinstance(pattern, dict):
        raise TunerFileError(f"{file.path} is damaged: its alpha_pattern is not a JSON object.")
    # PEFT matches the names within the component.
    for component in _ENCODER_NAMES:
        path = path.removeprefix(f"{component}.")
    key = pattern_key(pattern, path, str(file.path))
    value = default if key is None else pattern[key]
    # A Python integer may exceed the range of a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e30:
        raise TunerFileError(f"{file.path} is damaged: its alpha is {repr(value)[:40]}.")
    return float(value)
