"""Layout of ms-swift's SCETuning: a folder with `adapter_model.safetensors` and `adapter_config.json`.

Source: ms-swift 4.6.0, `swift/tuners/scetuning/` and `swift/tuners/base.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ..backbones import BaseInfo
from ..tuners.tuner import Tuner
from ..utils.atomic_write import atomic_write
from ..utils.errors import TunerFileError
from .foreign import ForeignFile
from .names import skip_readers
from .reading.peft_settings import check_settings
from .scepter import TENSORS, layer_at
from .skip_layers import WIDTHS_KEY, fit_ratio, skip_layers, skip_tuner, without_padding

_KEY = re.compile(r"(?P<module>.+)\.scetuner_(?P<adapter>[^.]+)\.tuner_op\.(?P<tensor>ln[12]\.(?:weight|bias))")
_LSC = re.compile(r"lsc_identity\.(\d+)")
_ADAPTER = "default"
# Widths and sites follow from the tensors; `tuner_mode` is read with the site.
_PLAIN = frozenset({"model_key_mapping", "dims", "target_modules", "down_ratio", "tuner_mode"})
# A hint module would be a second input of the tuner.
_LIMITED: dict[str, tuple[Any, ...]] = {
    "swift_type": ("SCETuning",),
    "tuner_op": ("SCEAdapter",),
    "hint_modules": ([], ""),
}


def recognizes(keys: Iterable[str]) -> bool:
    """Return whether the keys are those of an ms-swift SCETuning file."""
    return any(".scetuner_" in key for key in keys)


def read(file: ForeignFile, base: BaseInfo) -> Tuner:
    """Convert an SCETuning file to a skip tuner.

    Raises:
        TunerFileError: if the file contains other tensors or settings, or is for a base of another structure.
    """
    check_settings(file.settings, str(file.path), _PLAIN, _LIMITED)
    matches = {key: match for key in file.tensors if (match := _KEY.fullmatch(key))}
    file.refuse_others(matches, "a file of ms-swift's SCETuning")
    adapters = sorted({match["adapter"] for match in matches.values()})
    if len(adapters) > 1:
        raise TunerFileError(
            f"{file.path} contains the adapters {', '.join(adapters)}; convert a file with a single adapter."
        )
    modules = {match["module"]: key[: match.start("tensor")] for key, match in matches.items()}
    layers = {site_of(module, base, file): layer_at(file, prefix) for module, prefix in modules.items()}
    return skip_tuner(without_padding(layers, file.metadata), base, {}, str(file.path))


def site_of(module: str, base: BaseInfo, file: ForeignFile) -> str:
    """Return the skip connection of a module's tuner.

    Args:
        module: path of the module that ms-swift patched, in the U-Net of diffusers or SCEPTER.
        base: structure of the base.
        file: content of the file, with the patch mode in its settings.

    Raises:
        TunerFileError: if the tuner acts on anything but a skip connection.
    """
    readers = skip_readers(base)
    path = module.removeprefix("model.").removeprefix("unet.")
    mode = file.settings.get("tuner_mode")
    if match := _LSC.fullmatch(path):
        sites = list(readers)
        if int(match[1]) < len(sites):
            return sites[int(match[1])]
    elif mode in (None, "decoder"):
        for site, reader in readers.items():
            if path == reader:
                return site
    how = f" in {mode:.40} mode" if isinstance(mode, str) else ""
    raise TunerFileError(
        f"{file.path} tunes `{module:.120}`{how}, which is not a skip connection of this base: a tuner of "
        "ms-swift can be converted if it acts on the input of a decoder block "
        f"({readers['skip.0']}, decoder mode) or on SCEPTER's lsc_identity; in encoder mode it also changes the "
        "encoder."
    )


def write(tuner: Tuner, folder: Path) -> None:
    """Write a skip tuner in the layout that `Swift.from_pretrained(unet, folder)` loads.

    Args:
        tuner: a tuner with only a skip part.
        folder: output folder; the files go to its subfolder `default`, the name of ms-swift's default adapter.

    Raises:
        TunerFileError: if the tuner has other parts, or a file cannot be written.
    """
    readers = skip_readers(tuner.base)
    layers = skip_layers(tuner)
    sites = [site for site in readers if site in layers]
    channels = {site: tuner.base.sites[site].channels for site in sites}
    ratio = fit_ratio({site: (channels[site], layers[site].width) for site in sites}, _swift_width, slack=0)
    padded = {site: layers[site].of_width(_swift_width(ratio, channels[site])) for site in sites}
    tensors: dict[str, torch.Tensor] = {}
    for site in sites:
        layer = padded[site]
        prefix = f"{readers[site]}.scetuner_{_ADAPTER}.tuner_op."
        values = (layer.down, layer.down_bias, layer.up, layer.up_bias)
        tensors |= {prefix + name: value.contiguous() for name, value in zip(TENSORS, values, strict=True)}
    header = {"format": "pt"}
    if any(padded[site].width != layers[site].width for site in sites):
        header[WIDTHS_KEY] = json.dumps({site: layers[site].width for site in sites})
    settings = {
        "swift_type": "SCETuning",
        "model_key_mapping": None,
        "dims": [channels[site] for site in sites],
        "target_modules": [readers[site] for site in sites],
        "hint_modules": None,
        "tuner_mode": "decoder",
        "tuner_op": "SCEAdapter",
        "down_ratio": ratio,
    }
    with atomic_write(folder / _ADAPTER / "adapter_model.safetensors") as file:
        file.write(save(tensors, header))
    with atomic_write(folder / _ADAPTER / "adapter_config.json") as file:
        file.write(json.dumps(settings, indent=2, sort_keys=True).encode())


def _swift_width(ratio: float, channels: int) -> int:
    return int(channels * ratio)
