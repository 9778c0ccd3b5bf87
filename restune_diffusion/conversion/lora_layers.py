"""Convert between LoRA layers by site and a tuner with only LoRA: a `res` part, a `text` part, or both."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import reduce

import torch

from ..backbones import BaseInfo
from ..backbones.site_names import SiteName
from ..tuners import ResPart
from ..tuners.base import Part
from ..tuners.configs import PartConfig, ResConfig, TextConfig
from ..tuners.lora import ResLora
from ..tuners.text import TextPart
from ..tuners.tuner import Tuner
from ..utils.errors import TunerFileError
from .foreign import ForeignFile, make_config, some
from .lora_folding import DTYPE_KEY, LAYERS_KEY, LoraLayer, as_noted, folds, read_notes, scaled
from .names import linear_shapes, text_shapes

logger = logging.getLogger(__name__)

_LARGE = 320  # the smaller width of the first layers of Stable Diffusion: a LoRA of it is larger than they are
_HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_OPERATIONS = {"self": "self_attention", "cross": "cross_attention", "ff": "feed_forward"}


def layers_of(
    file: ForeignFile, found: Mapping[str, LoraLayer], sites: Mapping[str, str], others: Iterable[str], partial: bool
) -> dict[str, LoraLayer]:
    """Assign the layers of a file to sites.

    Args:
        file: source file, for messages.
        found: layers by their names in the file.
        sites: site of each supported name.
        others: names of further modules in the file.
        partial: skip modules without a site, with a warning, instead of raising an error.

    Raises:
        TunerFileError: if no module has a site, or `partial` is not set and a module has none.
    """
    outside = sorted([name for name in found if name not in sites] + list(others))
    placed = {sites[name]: layer for name, layer in found.items() if name in sites}
    if not placed:
        raise TunerFileError(
            f"{file.path} tunes none of the linear layers of this base's transformer blocks; it tunes {some(outside)}."
        )
    if outside and not partial:
        raise TunerFileError(
            f"{file.path} also tunes {some(outside)}; tuners support only the linear layers of transformer blocks: "
            "skip the others with --partial (partial=True), or load the file as a LoRA."
        )
    if outside:
        logger.warning("%s: skipped %d modules that no tuner supports: %s.", file.path, len(outside),
                       ", ".join(outside))  # fmt: skip
    return placed


def lora_tuner(layers: Mapping[str, LoraLayer], base: BaseInfo, metadata: Mapping[str, str], source: str) -> Tuner:
    """Create a tuner from LoRA layers.

    Args:
        layers: layers by the site of their linear layer.
        base: structure of the base.
        metadata: header entries to keep.
        source: name of the source file, for messages.

    Raises:
        TunerFileError: if a layer does not fit its site, or its rank or alpha is not valid.
    """
    _check(layers, base, source)
    of_unet = {site: layer for site, layer in layers.items() if not _in_text_encoder(site)}
    of_text = {site: layer for site, layer in layers.items() if _in_text_encoder(site)}
    configs: list[PartConfig] = []
    wholes = {}
    if of_unet:
        wholes["res"] = max(of_unet.values(), key=lambda layer: layer.rank)
        configs.append(_config(of_unet, base, wholes["res"], source))
    if of_text:
        wholes["text"] = max(of_text.values(), key=lambda layer: layer.rank)
        configs.append(_text_config(of_text, wholes["text"], source))
    for part, whole in wholes.items():
        if whole.rank >= _LARGE:
            logger.warning(
                "%s needs rank %d in all layers of `%s` to be exact: a large file; limit it with --rank or --energy.",
                source,
                whole.rank,
                part,
            )
    halves = [half for layer in layers.values() for half in (layer.down, layer.up)]
    dtype = narrow = reduce(torch.promote_types, [half.dtype for half in halves])
    if any(not folds(layer, wholes[_part(site)].factor, narrow) for site, layer in layers.items()):
        dtype = torch.promote_types(narrow, torch.float32)
    header = {key: value for key, value in metadata.items() if key not in (LAYERS_KEY, DTYPE_KEY)}
    tuner = Tuner.empty(tuple(configs), base, header)
    state: dict[str, torch.Tensor] = {}
    notes: dict[str, list[float]] = {}
    for site, lora in _loras(tuner).items():
        layer, whole = layers.get(site), wholes[_part(site)]
        if layer is None:
            notes[site] = [0, 0]
            down, up = torch.zeros(lora.down.weight.shape), torch.zeros(lora.up.weight.shape)
        else:
            if (layer.rank, layer.alpha) != (whole.rank, whole.alpha):
                notes[site] = [layer.rank, layer.alpha]
            down, up = _packed(layer, whole, dtype, f"{source} at {site}")
        state[f"{_part(site)}.{site}.lora.down.weight"] = down.to(dtype)
        state[f"{_part(site)}.{site}.lora.up.weight"] = up.to(dtype)
    if notes:
        tuner.metadata[LAYERS_KEY] = json.dumps(notes)
    if dtype != narrow:
        tuner.metadata[DTYPE_KEY] = str(narrow).removeprefix("torch.")
    tuner.load_state_dict(state, assign=True)
    return tuner


def _packed(layer: LoraLayer, whole: LoraLayer, dtype: torch.dtype, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `down` and `up` of a layer with the common rank and factor."""
    up = scaled(layer.up, layer.factor / whole.factor, dtype)
    if not torch.isfinite(up).all():
        raise TunerFileError(f"{where} has alpha = {layer.alpha}, which overflows {dtype} with the common factor.")
    padded = replace(layer, down=layer.down.to(dtype), up=up).padded(whole.rank)
    return padded.down, padded.up


def lora_layers(tuner: Tuner) -> dict[str, LoraLayer]:
    """Return the LoRA layers of a tuner by the site of their linear layer, imported ones in their original form.

    Raises:
        TunerFileError: if the tuner contains anything but LoRA.
    """
    notes = read_notes(tuner.metadata)
    narrow = _HALVES.get(tuner.metadata.get(DTYPE_KEY, ""))
    layers = {}
    loras = _loras(tuner)
    alphas = {config.part: _alpha(config) for config in tuner.configs}
    for site, lora in loras.items():
        alpha = alphas[_part(site)]
        layer = LoraLayer(lora.down.weight.detach().cpu(), lora.up.weight.detach().cpu(), alpha)
        noted_rank, noted_alpha = notes.get(site, (layer.rank, alpha))
        as_read = as_noted(layer, noted_rank, noted_alpha, narrow)
        if as_read is not None:
            layers[site] = as_read
    return layers


def _loras(tuner: Tuner) -> dict[str, ResLora]:
    """Return the LoRA modules of the U-Net and of the text encoders by site."""
    found: dict[str, ResLora] = {}
    for part in tuner.parts():
        loras = _loras_of(part)
        if not loras:
            families = ", ".join(config.part for config in tuner.configs)
            raise TunerFileError(
                f"A LoRA file can only represent a tuner with only lora, but this one ({families}) has other tuners "
                "too."
            )
        found |= loras
    return found


def _loras_of(part: Part) -> dict[str, ResLora]:
    """Return the LoRA modules of a part by site; empty if the part has anything else."""
    if isinstance(part, ResPart):
        loras = part.loras()
        return loras if len(loras) == len(part.writes) else {}
    if isinstance(part, TextPart) and not part.tokens:
        return {site.removesuffix(".lora"): lora for site, lora in part.at_site.items() if isinstance(lora, ResLora)}
    return {}


def _in_text_encoder(site: str) -> bool:
    return SiteName.find(site) is None


def _part(site: str) -> str:
    return "text" if _in_text_encoder(site) else "res"


def _alpha(config: PartConfig) -> float:
    assert isinstance(config, ResConfig | TextConfig)
    rank = config.width if isinstance(config, ResConfig) else config.rank
    return float(rank) if config.alpha is None else config.alpha


def _check(layers: Mapping[str, LoraLayer], base: BaseInfo, source: str) -> None:
    shapes = linear_shapes(base) | text_shapes(base)
    for site, layer in layers.items():
        inputs, outputs = shapes[site]
        found = (tuple(layer.down.shape), tuple(layer.up.shape))
        if len(found[0]) != 2 or layer.rank == 0 or found != ((layer.rank, inputs), (outputs, layer.rank)):
            raise TunerFileError(
                f"{source} is for another base: at {site} this base has {inputs} inputs and {outputs} outputs, "
                f"but the file's tensors have shapes {found[0]} and {found[1]}."
            )
        if not (math.isfinite(layer.alpha) and layer.alpha > 0):
            raise TunerFileError(
                f"{source} has alpha = {layer.alpha} at {site}, but alpha must be positive and finite."
            )


def _config(layers: Mapping[str, LoraLayer], base: BaseInfo, whole: LoraLayer, source: str) -> ResConfig:
    """Return the config of the smallest part that contains all the layers."""
    names = {site: SiteName.parse(site) for site in linear_shapes(base)}
    operations = {names[site].operation for site in layers}
    blocks = {names[site].place for site in layers}
    linears = {str(names[site].linear) for site in layers}
    possible = dict.fromkeys(name.place for name in names.values() if name.operation in operations)
    return make_config(
        ResConfig,
        source,
        **{name: "lora" if operation in operations else None for operation, name in _OPERATIONS.items()},
        width=whole.rank,
        alpha=None if whole.alpha == whole.rank else whole.alpha,
        linears=tuple(sorted(linears)),
        sites=("*",) if blocks == possible.keys() else tuple(block for block in possible if block in blocks),
    )


def _text_config(layers: Mapping[str, LoraLayer], whole: LoraLayer, source: str) -> TextConfig:
    """Return the config of the smallest part of text encoders that contains all the layers."""
    names = [site.split(".", 3) for site in layers]
    return make_config(
        TextConfig,
        source,
        rank=whole.rank,
        alpha=None if whole.alpha == whole.rank else whole.alpha,
        encoders=tuple(sorted({encoder for encoder, *_ in names})),
        linears=tuple(sorted({path for *_, path in names})),
    )
