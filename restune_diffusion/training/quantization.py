"""Quantization of the frozen base; the tuner trains in full precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..utils.errors import TrainingError


def quantize_base(base: nn.Module) -> None:
    """Quantize the weights of a base's linear layers to int8 with torchao, with one scale per output channel.

    Each forward pass dequantizes them to the dtype of the layer's input, so that gradients flow through them.
    Convolutions, norms and biases are not quantized.

    Raises:
        TrainingError: if torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise TrainingError(
            "A quantized base needs torchao; run pip install 'restune-diffusion[quantization]', "
            "or leave base_quantization out."
        ) from error
    quantize_(base, Int8WeightOnlyConfig())


def parameter_bytes(module: nn.Module) -> int:
    """Return the size of a module's parameters in bytes, quantized or not."""
    stored = (part for parameter in module.parameters() for part in stored_tensors(parameter.detach()))
    return sum(part.numel() * part.element_size() for part in stored)


def stored_tensors(tensor: Any) -> Iterator[torch.Tensor]:
    """Yield the stored tensors of a tensor: itself, or the components of a quantized tensor subclass."""
    if type(tensor) is torch.Tensor:
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from stored_tensors(getattr(tensor, name))
