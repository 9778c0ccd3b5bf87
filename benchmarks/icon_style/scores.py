"""Score drawings of the test concepts against the artist's own pictures."""

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
    """The networks that pictures are measured with."""

    inception: Any
    lpips: Any
    judges: Judges


@dataclass(frozen=True)
class Scorer:
    """Everything that the drawings of one style and seed are compared with."""

    yardsticks: Yardsticks
    style: str
    concepts: list[str]
    true_pictures: Tensor
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
        """Prepare the comparison pictures of a style.

        The KID reference is the style's pictures of other concepts, so that the artist's own test pictures can be
        scored by the same rule and give the ceiling.
        """
        own, features = data.styles[style], yardsticks.inception
        true_pictures = own.pixels(concepts)
        return cls(
            yardsticks,
            style,
            concepts,
            true_pictures,
            features(true_pictures),
            features(own.pixels(reference)),
            features(own.pixels(tuning)),
        )

    def score(self, pictures: Tensor) -> dict[str, float]:
        """Score one picture per test concept (N x 3 x 64 x 64 in [0, 1]).

        Returns:
            `kid` (x 1000) and `style_accuracy`: how well the style is met; `top1`, `top5`, `lpips`,
            `similarity` (Inception cosine): how well each picture shows its concept; `nearest_tuning`: mean Inception
            cosine distance to the nearest tuning picture.
        """
        judges, features = self.yardsticks.judges, self.yardsticks.inception(pictures)
        ranks = judges.concept_ranks(pictures, self.concepts)
        styles = judges.style_of(pictures)
        return {
            "kid": kid(features, self.reference_features),
            "style_accuracy": sum(name == self.style for name in styles) / len(styles),
            "top1": mean(ranks < 1),
            "top5": mean(ranks < 5),
            "lpips": mean(self.yardsticks.lpips(pictures, self.true_pictures)),
            "similarity": mean(similarity(features, self.true_features)),
            "nearest_tuning": mean(nearest_distance(features, self.tuning_features)),
        }


def kid(found: Tensor, reference: Tensor) -> float:
    """KID (x 1000) between Inception features, N x C and M x C, by a hundred subsets of half the smaller set."""
    size = min(len(found), len(reference)) // 2
    distance, _ = kernel_distance(found, reference, subset_size=size, subsets=100, seed=0)
    return 1000 * distance


def mean(values: Tensor | Sequence[float]) -> float:
    """The mean as a plain number."""
    return float(torch.as_tensor(values).float().mean())
