"""DoRA as a difference from the base: `W' = m (W + dW) / |W + dW|` (arXiv 2402.09353), `W' - W` as a matrix.

Source: lycoris-lora 4.1.3 (`functional/general.py`) and PEFT 0.21.2 (`tuners/lora/dora.py`). The magnitude `m` has one
value for each output (`|.|` of the rows), or in files of older trainers for each input (of the columns). The
difference is exact at weight 1. At other weights a tuner scales it, while LyCORIS scales the changes of magnitude and
direction apart.
"""

from __future__ import annotations

import torch

from ...utils.errors import TunerFileError
from ..lora_folding import LoraLayer
from .families import full


def decomposed(layer: LoraLayer, magnitude: torch.Tensor, weight: torch.Tensor, where: str) -> LoraLayer:
    """Return the difference that DoRA makes to a weight.

    Args:
        layer: change of the direction.
        magnitude: magnitude of each output, `(outputs,)` or `(outputs, 1)`, or of each input, `(1, inputs)`; more
            dimensions of one are allowed.
        weight: weight of the base's layer.
        where: file and module, for messages.

    Raises:
        TunerFileError: if the shapes do not fit together.
    """
    outputs, inputs = weight.shape[:2]
    if (layer.up.shape[0], layer.down.shape[1]) != (outputs, weight[0].numel()):
        raise TunerFileError(f"{where} is for another base: this base has a layer of {inputs} inputs and {outputs} "
                             "outputs there.")  # fmt: skip
    before = weight.double().reshape(outputs, inputs, -1)
    changed = before + layer.factor * (layer.up.double() @ layer.down.double()).reshape(before.shape)
    if _without_ones(magnitude) in ((outputs,), (outputs, 1)):
        norm = torch.linalg.vector_norm(changed, dim=(1, 2), keepdim=True)
    elif _without_ones(magnitude) == (1, inputs):
        norm = torch.linalg.vector_norm(changed, dim=(0, 2), keepdim=True)
    else:
        raise TunerFileError(f"{where} is damaged: its magnitude has the shape {tuple(magnitude.shape)}.")
    # Trainers add epsilon, so that a row of zeros stays zero.
    after = changed * (magnitude.double().reshape(norm.shape) / (norm + torch.finfo(torch.float32).eps))
    return full((after - before).flatten(1).float())


def _without_ones(magnitude: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of a magnitude without the dimensions of a kernel, if these are one."""
    shape = tuple(magnitude.shape)
    return shape[:2] if set(shape[2:]) <= {1} else shape
