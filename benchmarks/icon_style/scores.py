"""Score samples of the test concepts against the true images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from restune_diffusion.evaluation.metrics import kernel_distance, nearest_distance, similarity

from .data import IconData
from .judges import Judges


@dataclass(frozen=True)
class Yardsticks:
    """Networks of the metrics."""

    inception: Any
    lpips: Any
    judges: Judges


@dataclass(frozen=True)
class Scorer:
    """Reference images and features for scoring the samples of one style and seed."""

    yardsticks: Yardsticks
    style: str
    concepts: list[str]
    true_images: Tensor
    true_features: Tensor
    reference_features: Tensor
    tuning_features: Tensor

    @classmethod
    def of(
        cls,
        data: IconData,
        style: str,
        concepts: list[str],
        tuning: list[str],
        reference: list[str],
        yardsticks: Yardsticks,
    ) -> Scorer:
        """Return the scorer of a style.

        The KID reference consists of the style's images of other concepts, so that the true images of the test
        concepts can be scored in the same way as an upper bound.
        """
        own, features = data.styles[style], yardsticks.inception
        true_images = own.pixels(concepts)
        return cls(
            yardsticks,
            style,
            concepts,
            true_images,
            features(true_images),
            features(own.pixels(reference)),
            features(own.pixels(tuning)),
        )

    def score(self, images: Tensor) -> dict[str, float]:
        """Score one image per test concept (N x 3 x 64 x 64 in [0, 1]).

        Returns:
            Style metrics: `kid` (x 1000) and `style_accuracy`. Concept metrics: `top1`, `top5`, `lpips` and
            `similarity` (Inception cosine). `nearest_tuning`: mean Inception cosine distance to the nearest tuning
            image.
        """
        judges, features = self.yardsticks.judges, self.yardsticks.inception(images)
        ranks = judges.concept_ranks(images, self.concepts)
        styles = judges.style_of(images)
        return {
            "kid": kid(features, self.reference_features),
            "style_accuracy": sum(name == self.style for name in styles) / len(styles),
            "top1": mean(ranks < 1),
            "top5": mean(ranks < 5),
            "lpips": mean(self.yardsticks.lpips(images, self.true_images)),
            "similarity": mean(similarity(features, self.true_features)),
            "nearest_tuning": mean(nearest_distance(features, self.tuning_features)),
        }


def kid(found: Tensor, reference: Tensor) -> float:
    """Return the KID (x 1000) of Inception features, N x C and M x C, over 100 subsets of half the smaller set."""
    size = min(len(found), len(reference)) // 2
    distance, _ = kernel_distance(found, reference, subset_size=size, subsets=100, seed=0)
    return 1000 * distance


def mean(values: Tensor | Sequence[float]) -> float:
    """Return the mean as a float."""
    return float(torch.as_tensor(values).float().mean())
