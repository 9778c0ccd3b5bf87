"""The metrics of an evaluation: what each one compares images with, and which direction is better."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, TypeAlias

MetricName: TypeAlias = Literal[
    "kid", "style_share", "retrieval_top1", "retrieval_top5", "lpips", "similarity", "nearest_training", "drift"
]
"""Name of a metric, as in report.json."""


@dataclass(frozen=True)
class Metric:
    """Meaning, direction and requirements of a metric.

    Attributes:
        heading: heading of its column in a report.
        meaning: explanation for the report.
        lower_is_better: whether a lower value is the better one.
        true_images: number of true images that it needs; 0 if it compares with other images.
        digits: digits shown after the decimal point.
        factor: factor of the shown value.
    """

    heading: str
    meaning: str
    lower_is_better: bool
    true_images: int = 0
    digits: int = 3
    factor: float = 1

    def shown(self, value: float | None) -> str:
        """Return a value as text; a dash if there is none."""
        return "–" if value is None else f"{value * self.factor:.{self.digits}f}"


METRICS: dict[MetricName, Metric] = {
    "kid": Metric(
        "KID x1000",
        "kernel distance to the true images, lower is better; slightly negative values are possible. The row of the "
        "true images compares one half of them with the other.",
        lower_is_better=True,
        true_images=2,
        digits=2,
        factor=1e3,
    ),
    "style_share": Metric(
        "style share",
        "share of images that are closer to another caption's true image than to another caption's image by the "
        "base. The value of the true images is the target.",
        lower_is_better=False,
        true_images=2,
        digits=2,
    ),
    "retrieval_top1": Metric(
        "own subject, top 1",
        "share of images that are closer to the true image of their own caption than to any other true image.",
        lower_is_better=False,
        true_images=2,
        digits=2,
    ),
    "retrieval_top5": Metric(
        "own subject, top 5",
        "share of images for which the true image of their own caption is among the five most similar true images.",
        lower_is_better=False,
        # With five images or fewer, every image is among the five most similar ones.
        true_images=6,
        digits=2,
    ),
    "lpips": Metric(
        "LPIPS",
        "perceptual distance to the true image of the same caption, lower is closer.",
        lower_is_better=True,
        true_images=1,
    ),
    "similarity": Metric(
        "similarity",
        "cosine similarity to the true image of the same caption, higher is closer.",
        lower_is_better=False,
        true_images=1,
    ),
    "nearest_training": Metric(
        "to nearest training image",
        "mean of 1 - cosine similarity to the most similar training image. A value clearly below that of the true "
        "images means that training images are reproduced.",
        lower_is_better=False,
    ),
    "drift": Metric(
        "drift",
        "LPIPS between the base's and the tuner's images for the drift prompts, which do not name the style; lower "
        "means less unwanted change.",
        lower_is_better=True,
    ),
}
"""The metrics in the order of the report."""

KID_IMAGES = 24
"""Number of true images from which a KID says more than noise. On icons, the KID (x 1000) of other images of the same
style varies by 25 with 4 images, by 11 with 8, and by 4 with 24; that of another style is about 30."""

INCEPTION_METRICS = frozenset(METRICS) - {"lpips", "drift"}
"""Metrics on Inception features; the others use LPIPS."""


def without_reference(names: Collection[str], *, true: int, training: int, drift: int) -> dict[MetricName, str]:
    """Return the metrics that cannot be measured, each with what it needs.

    Args:
        names: names of the metrics that are asked for.
        true: number of true images, one for each caption.
        training: number of training images.
        drift: number of drift prompts.
    """
    missing: dict[MetricName, str] = {}
    for name, metric in METRICS.items():
        if name not in names:
            continue
        if true < metric.true_images:
            images = f"{metric.true_images} held-out images" if metric.true_images > 1 else "a held-out image"
            missing[name] = f"needs {images}, and there {'is 1' if true == 1 else 'are ' + str(true or 'none')}"
        elif name == "nearest_training" and not training:
            missing[name] = "needs the training images"
        elif name == "drift" and not drift:
            missing[name] = "needs drift prompts"
    return missing
