"""Names of the metrics, what each one compares images with, and which direction is better; imports no torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

MetricName: TypeAlias = Literal[
    "kid", "style_share", "retrieval_top1", "retrieval_top5", "lpips", "similarity", "nearest_training", "drift"
]
"""Name of a metric, as in report.json."""


@dataclass(frozen=True)
class Metric:
    """Direction and requirements of a metric.

    Attributes:
        lower_is_better: whether a lower value is the better one.
        true_images: number of true images that it needs; 0 if it compares with other images.
    """

    lower_is_better: bool
    true_images: int = 0


METRICS: dict[MetricName, Metric] = {
    "kid": Metric(lower_is_better=True, true_images=2),
    "style_share": Metric(lower_is_better=False, true_images=2),
    "retrieval_top1": Metric(lower_is_better=False, true_images=2),
    # With five images or fewer, every image is among the five most similar ones.
    "retrieval_top5": Metric(lower_is_better=False, true_images=6),
    "lpips": Metric(lower_is_better=True, true_images=1),
    "similarity": Metric(lower_is_better=False, true_images=1),
    "nearest_training": Metric(lower_is_better=False),
    "drift": Metric(lower_is_better=True),
}
"""The metrics in the order of the report."""

INCEPTION_METRICS = frozenset(METRICS) - {"lpips", "drift"}
"""Metrics on Inception features; the others use LPIPS."""

assert tuple(METRICS) == get_args(MetricName)


def without_reference(names: Collection[str], *, true: int, training: int, drift: int) -> dict[str, str]:
    """Return the metrics that cannot be measured, each with what it needs.

    Args:
        names: names of the metrics that are asked for.
        true: number of true images, one for each caption.
        training: number of training images.
        drift: number of drift prompts.
    """
    missing: dict[str, str] = {}
    for name, metric in METRICS.items():
        if name not in names:
            continue
        if true < metric.true_images:
            images = f"{metric.true_images} held-out images" if metric.true_images > 1 else "a held-out image"
            missing[name] = f"needs {images}, and there are {true or 'none'}"
        elif name == "nearest_training" and not training:
            missing[name] = "needs the training images"
        elif name == "drift" and not drift:
            missing[name] = "needs drift prompts"
    return missing
