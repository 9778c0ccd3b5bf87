"""Convert between LoRA layers by site and a tuner with only LoRA: a `res` part, a `text` part, or both."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, reduce

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
from .names import unet_shapes, weight_shapes

logger = logging.getLogger(__name__)

# Groups of layers with a common rank and alpha, by their names in messages.
_RES, _CONVOLUTIONS, _TEXT = "res", "convolutions of res", "text"
_LARGE = 320  # the smaller width of the first layers of Stable Diffusion: a LoRA of it is larger than they are
_HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_OPERATIONS = {"self": "self_attention", "cross": "cross_attention", "ff": "feed_forward", "proj": "projections",
               "conv": "convolutions", "ends": "ends"}  # fmt: skip


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
            f"{file.path} tunes none of the layers of this base that LoRA can act on; it tunes {some(outside)}."
        )
    if outside and not partial:
        raise TunerFileError(
            f"{file.path} also tunes {some(outside)}, which this base lacks or no tuner changes: "
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
    shapes = weight_shapes(base)
    _check(layers, shapes, source)
    groups: dict[str, dict[str, LoraLayer]] = {}
    for site, layer in layers.items():
        groups.setdefault(_group(site, shapes[site]), {})[site] = layer
    wholes = {group: max(of_group.values(), key=lambda layer: layer.rank) for group, of_group in groups.items()}
    for group, whole in wholes.items():
        if whole.rank >= _LARGE:
            logger.warning(
                "%s needs rank %d in all layers of `%s` to be exact: a large file; limit it with --rank or --energy.",
                source,
                whole.rank,
                group,
            )
    configs: list[PartConfig] = []
    of_unet = groups.get(_RES, {}) | groups.get(_CONVOLUTIONS, {})
    if of_unet:
        # A part has a rank for its layers and may have another for its convolutions.
        wholes.setdefault(_RES, wholes.get(_CONVOLUTIONS, next(iter(wholes.values()))))
        configs.append(_config(of_unet, base, wholes[_RES], wholes.get(_CONVOLUTIONS, wholes[_RES]), source))
    if _TEXT in groups:
        configs.append(_text_config(groups[_TEXT], wholes[_TEXT], source))
    halves = [half for layer in layers.values() for half in (layer.down, layer.up)]
    dtype = narrow = reduce(torch.promote_types, [half.dtype for half in halves])
    if any(not folds(layer, wholes[_group(site, shapes[site])].factor, narrow) for site, layer in layers.items()):
        dtype = torch.promote_types(narrow, torch.float32)
    header = {key: value for key, value in metadata.items() if key not in (LAYERS_KEY, DTYPE_KEY)}
    tuner = Tuner.empty(tuple(configs), base, header)
    state: dict[str, torch.Tensor] = {}
    notes: dict[str, list[float]] = {}
    for site, lora in _loras(tuner).items():
        if site not in layers:
            notes[site] = [0, 0]
            down, up = torch.zeros(lora.down.weight.shape), torch.zeros(lora.up.weight.shape)
        else:
            layer, whole = layers[site], wholes[_group(site, shapes[site])]
            if (layer.rank, layer.alpha) != (whole.rank, whole.alpha):
                notes[site] = [layer.rank, layer.alpha]
            down, up = _packed(layer, whole, dtype, f"{source} at {site}").halves(shapes[site])
        state[f"{_part(site)}.{site}.lora.down.weight"] = down.to(dtype)
        state[f"{_part(site)}.{site}.lora.up.weight"] = up.to(dtype)
    if notes:
        tuner.metadata[LAYERS_KEY] = json.dumps(notes)
    if dtype != narrow:
        tuner.metadata[DTYPE_KEY] = str(narrow).removeprefix("torch.")
    tuner.load_state_dict(state, assign=True)
    return tuner


def _packed(layer: LoraLayer, whole: LoraLayer, dtype: torch.dtype, where: str) -> LoraLayer:
    """Return a layer with the common rank and factor."""
    up = scaled(layer.up, layer.factor / whole.factor, dtype)
    if not torch.isfinite(up).all():
        raise TunerFileError(f"{where} has alpha = {layer.alpha}, which overflows {dtype} with the common factor.")
    return replace(layer, down=layer.down.to(dtype), up=up).padded(whole.rank)


def lora_layers(tuner: Tuner) -> dict[str, LoraLayer]:
    """Return the LoRA layers of a tuner by the site of their linear layer, imported ones in their original form.

    Raises:
        TunerFileError: if the tuner contains anything but LoRA.
    """
    notes = read_notes(tuner.metadata)
    narrow = _HALVES.get(tuner.metadata.get(DTYPE_KEY, ""))
    layers = {}
    loras = _loras(tuner)
    alphas = {group: alpha for config in tuner.configs for group, alpha in _alphas(config).items()}
    for site, lora in loras.items():
        alpha = alphas[_group(site, lora.down.weight.shape)]
        down, up = (half.weight.detach().cpu().flatten(1) for half in (lora.down, lora.up))
        layer = LoraLayer(down, up, alpha)
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
                f"Only a tuner of lora alone can be written as a LoRA or reduced to a rank; this one has {families}."
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


@lru_cache(maxsize=4096)
def _in_text_encoder(site: str) -> bool:
    return SiteName.find(site) is None


def _part(site: str) -> str:
    return "text" if _in_text_encoder(site) else "res"


def _group(site: str, shape: Sequence[int]) -> str:
    """Return the group of layers with a common rank and alpha, by site and shape of the weight or of `down`."""
    if _in_text_encoder(site):
        return _TEXT
    return _CONVOLUTIONS if any(size > 1 for size in shape[2:]) else _RES


def _alphas(config: PartConfig) -> dict[str, float]:
    """Return alpha by group."""
    assert isinstance(config, ResConfig | TextConfig)
    if isinstance(config, TextConfig):
        return {_TEXT: float(config.rank if config.alpha is None else config.alpha)}
    alpha = float(config.width if config.alpha is None else config.alpha)
    if config.conv_width is None:
        return {_RES: alpha, _CONVOLUTIONS: alpha}
    return {_RES: alpha, _CONVOLUTIONS: float(config.conv_width if config.conv_alpha is None else config.conv_alpha)}


def _check(layers: Mapping[str, LoraLayer], shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    for site, layer in layers.items():
        outputs, inputs, *kernel = shapes[site]
        found = (tuple(layer.down.shape), tuple(layer.up.shape))
        if len(found[0]) != 2 or layer.rank == 0 or found != ((layer.rank, inputs * math.prod(kernel)),
                                                              (outputs, layer.rank)):  # fmt: skip
            of_kernel = f" with a kernel of {kernel[0]}x{kernel[1]}" if kernel else ""
            raise TunerFileError(
                f"{source} is for another base: at {site} this base has {inputs} inputs and {outputs} outputs"
                f"{of_kernel}, but the file's tensors have shapes {found[0]} and {found[1]}."
            )
        if not (math.isfinite(layer.alpha) and layer.alpha > 0):
            raise TunerFileError(
                f"{source} has alpha = {layer.alpha} at {site}, but alpha must be positive and finite."
            )


def _config(
    layers: Mapping[str, LoraLayer], base: BaseInfo, whole: LoraLayer, convolutions: LoraLayer, source: str
) -> ResConfig:
    """Return the config of the smallest part that contains all the layers."""
    names = {site: SiteName.parse(site) for site in unet_shapes(base)}
    same = (convolutions.rank, convolutions.alpha) == (whole.rank, whole.alpha)
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
        conv_width=None if same else convolutions.rank,
        conv_alpha=None if same or convolutions.alpha == convolutions.rank else convolutions.alpha,
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
