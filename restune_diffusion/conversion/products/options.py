"""Options of an import, and the reading of one layer by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from ...utils.errors import TunerFileError
from ..lora_folding import LoraLayer
from .decomposed import decomposed
from .families import layer_from
from .reduction import Reduction

BaseWeights: TypeAlias = Callable[[str], torch.Tensor]
"""Function from the site of a layer to its weight in the base."""


@dataclass(frozen=True)
class ImportOptions:
    """Options of reading a LoRA or LyCORIS file.

    Args:
        partial: skip modules that no tuner supports, with a warning, instead of raising an error.
        reduction: limit of the layers' rank.
        base_weights: weights of the base, which DoRA needs; None if they are not available.
    """

    partial: bool = False
    reduction: Reduction = field(default_factory=Reduction)
    base_weights: BaseWeights | None = None

    def layer(
        self,
        tensors: Mapping[str, torch.Tensor],
        site: str,
        shape: tuple[int, ...],
        where: str,
        *,
        alpha: float | None = None,
        scale: float | None = None,
    ) -> LoraLayer:
        """Return the weight change that a module's tensors define, within the limits.

        Args:
            tensors: tensors of the module, by their names in `families.TENSORS`.
            site: site of the module.
            shape: shape of the base's weight at the site.
            where: file and module, for messages.
            alpha: alpha if the file has no tensor of it; None for the rank.
            scale: factor `alpha / rank` of LoHa and LoKr, if settings define it.

        Raises:
            TunerFileError: if the tensors are not valid, or DoRA needs weights that are not available.
        """
        layer = layer_from(tensors, shape, where, alpha, scale)
        if "dora_scale" in tensors:
            if self.base_weights is None:
                raise TunerFileError(
                    f"{where} is DoRA, whose weight change depends on the base's weights; convert it with "
                    "`restune convert --base FOLDER`, with the checkpoint that it was trained for."
                )
            layer = decomposed(layer, tensors["dora_scale"], self.base_weights(site), where)
        return self.reduction(layer)
