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
        magnitude: magnitude of each output, `(outputs,)` or `(outputs, 1)`, or of each input, `(1, inputs)`.
        weight: weight of the base's layer.
        where: file and module, for messages.

    Raises:
        TunerFileError: if the shapes do not fit together.
    """
    outputs, inputs = weight.shape
    if (layer.up.shape[0], layer.down.shape[1]) != (outputs, inputs):
        raise TunerFileError(f"{where} is for another base: this base has a layer of {inputs} inputs and {outputs} "
                             "outputs there.")  # fmt: skip
    changed = weight.double() + layer.factor * (layer.up.double() @ layer.down.double())
    if tuple(magnitude.shape) in ((outputs,), (outputs, 1)):
        norm = changed.norm(dim=1, keepdim=True)
    elif tuple(magnitude.shape) == (1, inputs):
        norm = changed.norm(dim=0, keepdim=True)
    else:
        raise TunerFileError(f"{where} is damaged: its magnitude has the shape {tuple(magnitude.shape)}.")
    # Trainers add epsilon, so that a row of zeros stays zero.
    after = changed * (magnitude.double().reshape(norm.shape) / (norm + torch.finfo(torch.float32).eps))
    return full((after - weight.double()).float())
