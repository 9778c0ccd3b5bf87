"""Report of an extraction: what of a checkpoint's change the tuner has, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from ...utils.display import counted


@dataclass(frozen=True)
class ExtractedLayer:
    """Layer whose change is in the tuner.

    Attributes:
        component: `unet`, `text_encoder` or `text_encoder_2`.
        name: name of the layer in diffusers' format.
        site: site of the layer.
        rank: rank of its LoRA.
        norm: Frobenius norm of the change.
        relative: norm of the change, relative to that of the weight.
        kept: share of the squared norm that is kept, from 0 to 1.
    """

    component: str
    name: str
    site: str
    rank: int
    norm: float
    relative: float
    kept: float


@dataclass(frozen=True)
class LeftOut:
    """Tensor whose change no tuner can represent.

    Attributes:
        component: `unet`, `text_encoder` or `text_encoder_2`.
        name: name of the tensor in diffusers' format.
        kind: `norm`, `bias`, `embedding` or `other`.
        norm: Frobenius norm of the change.
        relative: norm of the change, relative to that of the tensor.
    """

    component: str
    name: str
    kind: str
    norm: float
    relative: float


@dataclass
class ExtractionReport:
    """What of the change of a checkpoint is kept.

    Attributes:
        source: the fine-tuned checkpoint.
        base: its base.
        layers: layers of the tuner.
        left_out: tensors that no tuner can represent.
        unchanged: number of tensors that are equal in both checkpoints.
    """

    source: str
    base: str
    layers: list[ExtractedLayer] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    unchanged: int = 0

    @property
    def total(self) -> float:
        """Squared norm of the whole change."""
        changes: list[ExtractedLayer | LeftOut] = [*self.layers, *self.left_out]
        return sum(each.norm**2 for each in changes)

    @property
    def kept(self) -> float:
        """Share of the squared norm of the whole change that the tuner has."""
        return sum(layer.norm**2 * layer.kept for layer in self.layers) / self.total if self.total else 1.0

    @property
    def kept_of_layers(self) -> float:
        """Share of the squared norm of the layers' change that their rank keeps."""
        total = sum(layer.norm**2 for layer in self.layers)
        return sum(layer.norm**2 * layer.kept for layer in self.layers) / total if total else 1.0

    def as_json(self) -> dict[str, Any]:
        """Return the report for a JSON file."""
        return {
            "source": self.source,
            "base": self.base,
            "kept": self.kept,
            "kept_of_layers": self.kept_of_layers,
            "unchanged_tensors": self.unchanged,
            "layers": [asdict(layer) for layer in self.layers],
            "left_out": [{**asdict(each), "share": each.norm**2 / self.total} for each in self.left_out],
        }

    def describe(self) -> str:
        """Return a summary: by component what is kept, then what is left out and the layers that lose most."""
        lines = []
        for component in dict.fromkeys(layer.component for layer in self.layers):
            layers = [layer for layer in self.layers if layer.component == component]
            energy = sum(layer.norm**2 for layer in layers)
            kept = sum(layer.norm**2 * layer.kept for layer in layers) / energy
            ranks = sorted(layer.rank for layer in layers)
            lines.append(
                f"{component}: {counted(len(layers), 'layer')}, ranks {ranks[0]} to {ranks[-1]}, keep {kept:.2%} of "
                "their change (squared norm)."
            )
        lines += [f"  {layer.kept:7.2%} of {layer.component} {layer.name}" for layer in self._least_kept()]
        if self.left_out:
            lines.append(f"Left out, {self._share(self.left_out):.2%} of the whole change, which no tuner represents:")
            for kind in dict.fromkeys(each.kind for each in self.left_out):
                tensors = [each for each in self.left_out if each.kind == kind]
                lines.append(f"  {self._share(tensors):7.2%} in {counted(len(tensors), f'{kind} tensor')}")
        return "\n".join(lines)

    def _least_kept(self) -> list[ExtractedLayer]:
        reduced = [layer for layer in self.layers if layer.kept < 0.9999]
        return sorted(reduced, key=lambda layer: layer.kept)[:3]

    def _share(self, tensors: Iterable[LeftOut]) -> float:
        return sum(each.norm**2 for each in tensors) / self.total


def kind_of_tensor(name: str) -> str:
    """Return the kind of a tensor that no tuner represents, by its name."""
    if "norm" in name:
        return "norm"
    if name.endswith(".bias"):
        return "bias"
    return "embedding" if "token_embedding" in name or "position_embedding" in name else "other"
