"""Extract the difference of a fine-tuned checkpoint and its base as a tuner of LoRA layers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...backbones import BaseInfo, module_path
from ...tuners.tuner import Tuner
from ...utils.errors import RestuneError
from ..bases import describe_checkpoint
from ..lora_folding import LoraLayer
from ..lora_layers import lora_tuner
from ..names import text_path, text_shapes, unet_shapes
from ..products.reduction import Reduction
from .checkpoint import COMPONENTS, Checkpoint, open_checkpoint
from .low_rank import low_rank
from .report import ExtractedLayer, ExtractionReport, LeftOut, kind_of_tensor

_TEXT_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Extraction:
    """Tuner of an extraction, and the report of what it keeps."""

    tuner: Tuner
    report: ExtractionReport


def extract_lora(
    source: str,
    base: str,
    reduction: Reduction | None = None,
    *,
    advance: Callable[[int, int], object] = lambda done, total: None,
) -> Extraction:
    """Return the difference of two checkpoints as LoRA on linear layers and convolutions.

    The checkpoints are read tensor by tensor. A tensor of a source in half precision counts as unchanged if it is the
    base's, rounded to that precision.

    Args:
        source: the fine-tuned checkpoint: a folder in diffusers' format, or a safetensors file.
        base: checkpoint that it was trained from, also a repository id on the Hub.
        reduction: limits of the rank; without them each layer has the rank of its change.
        advance: is called with the number of tensors that are done, and of all.

    Raises:
        RestuneError: if a checkpoint cannot be read, they differ in structure, or not at all.
    """
    reduction = reduction or Reduction()
    structure = describe_checkpoint(base)
    report = ExtractionReport(source, base)
    layers: dict[str, LoraLayer] = {}
    with open_checkpoint(base, structure) as old, open_checkpoint(source, structure) as new:
        names = _compared(old, new, structure)
        sites = _sites(structure)
        for number, (component, name) in enumerate(names):
            _extract(old, new, component, name, sites, reduction, layers, report)
            advance(number + 1, len(names))
    if not layers:
        others = " in layers that no tuner represents, such as norms and biases," if report.left_out else ""
        verb = "only differs" if others else "does not differ"
        raise RestuneError(f"{source} {verb}{others} from its base {base}; there is nothing to extract.")
    return Extraction(lora_tuner(layers, structure, {}, source), report)


def _sites(base: BaseInfo) -> dict[tuple[str, str], str]:
    """Return the site of each layer that LoRA can act on, by component and the name of its weight."""
    sites = {("unet", f"{module_path(site)}.weight"): site for site in unet_shapes(base)}
    for site in text_shapes(base):
        component, _, path = text_path(site).partition(".")
        sites[component, f"{path.removeprefix('text_model.')}.weight"] = site
    return sites


def _compared(old: Checkpoint, new: Checkpoint, base: BaseInfo) -> list[tuple[str, str]]:
    """Return the component and name of each tensor to compare; components that the new checkpoint lacks are equal."""
    names = []
    for component in COMPONENTS:
        if not new.places.get(component) or (component != "unet" and component not in base.text):
            continue
        theirs, missing = new.places[component], []
        for name in old.places[component]:
            layer = _TEXT_LAYER.match(name)
            if name.endswith("position_ids") or (
                layer and component != "unet" and int(layer[1]) >= base.text[component].num_hidden_layers
            ):
                continue
            if name in theirs:
                names.append((component, name))
            else:
                missing.append(name)
        if missing:
            raise RestuneError(
                f"{new.name} was not fine-tuned from {old.name}: its {component} lacks {len(missing)} tensors, such "
                f"as `{missing[0]}`; give its own base with --base."
            )
    return names


def _extract(
    old: Checkpoint,
    new: Checkpoint,
    component: str,
    name: str,
    sites: dict[tuple[str, str], str],
    reduction: Reduction,
    layers: dict[str, LoraLayer],
    report: ExtractionReport,
) -> None:
    before, after = old.read(component, name), new.read(component, name)
    if before.squeeze().shape != after.squeeze().shape:
        raise RestuneError(
            f"{new.name} was not fine-tuned from {old.name}: `{name}` of its {component} has the shape "
            f"{tuple(after.shape)}, and that of the base {tuple(before.shape)}; give its own base with --base."
        )
    if not before.is_floating_point() or not after.is_floating_point():
        return
    after = after.reshape(before.shape)
    if not torch.isfinite(after).all():
        raise RestuneError(f"{new.name} is damaged: `{name}` of its {component} has NaN or infinity.")
    change = after.float() - before.float()
    # Of a source in half precision, the base is rounded; otherwise the conversion is exact.
    if torch.equal(after, before.to(after.dtype)):
        report.unchanged += 1
        return
    norm = float(change.double().norm())
    relative = norm / max(float(before.double().norm()), 1e-30)
    site = sites.get((component, name))
    if site is None:
        report.left_out.append(LeftOut(component, name, kind_of_tensor(name), norm, relative))
        return
    layer, kept = low_rank(change, reduction, float(before.double().square().mean().sqrt()))
    layers[site] = layer
    path = name.removesuffix(".weight")
    report.layers.append(ExtractedLayer(component, path, site, layer.rank, norm, relative, kept))
