"""Condition images of an attached tuner, and their encoded features."""

from __future__ import annotations

from dataclasses import dataclass

import torch

EncodedConditions = tuple[dict[str, torch.Tensor], ...]
"""Features by site, for each condition."""


@dataclass
class Conditions:
    """Condition images of a tuner, and their encoded features."""

    images: list[torch.Tensor | None]
    weights: tuple[float, ...]
    encoded: EncodedConditions | None = None
    """Features by site for each condition: computed in the first forward pass and reused for the same latent size; in
    training computed in every forward pass."""
    size: tuple[int, int] | None = None
    """Height and width of the latent for which the images were encoded."""
    of_one_pass: bool = False
    """Whether the features are valid for a single forward pass, because they require gradients."""


class ConditionFeatures:
    """Features of condition images in tensors that are kept from image to image.

    A compiled graph takes their addresses as fixed: a CUDA graph would be recorded again for features elsewhere.
    """

    def __init__(self) -> None:
        self._kept: EncodedConditions = ()
        self._owner: Conditions | None = None

    def store(self, conditions: Conditions, encoded: EncodedConditions) -> None:
        """Give condition images their features; those of the images before are encoded again when they are needed."""
        if self._owner is not None and self._owner is not conditions:
            self._owner.encoded = None
        if _like(self._kept) == _like(encoded):
            for kept, new in zip(self._kept, encoded, strict=True):
                for site, feature in new.items():
                    kept[site].copy_(feature)
        else:
            self._kept = encoded
        self._owner, conditions.encoded = conditions, self._kept


def _like(encoded: EncodedConditions) -> list[dict[str, tuple[torch.Size, torch.dtype, torch.device]]]:
    return [
        {site: (feature.shape, feature.dtype, feature.device) for site, feature in levels.items()}
        for levels in encoded
    ]
