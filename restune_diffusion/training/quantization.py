"""Hold the frozen base in fewer bits while its tuner trains in full precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..utils.errors import TrainingError


def quantize_base(base: nn.Module) -> None:
    """Hold the weights of a base's linear layers as int8, with a factor for each output channel, by torchao.

    They are brought back to the dtype of what they are multiplied with in each pass, so gradients flow through them as
    ever. Convolutions, norms and biases stay as they are.

    Raises:
        TrainingError: if torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise TrainingError(
            "A quantised base needs torchao; run pip install 'restune-diffusion[quantization]', "
            "or leave base_quantization out."
        ) from error
    quantize_(base, Int8WeightOnlyConfig())


def parameter_bytes(module: nn.Module) -> int:
    """Return the memory that a module's parameters take, quantised or not."""
    stored = (part for parameter in module.parameters() for part in stored_tensors(parameter.detach()))
    return sum(part.numel() * part.element_size() for part in stored)


def stored_tensors(tensor: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that one is made of, itself as a rule; a quantised one claims the dtype that it stands for."""
    if type(tensor) is torch.Tensor:
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from stored_tensors(getattr(tensor, name))
