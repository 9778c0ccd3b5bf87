"""Quantization of the frozen base; the tuner trains in full precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..utils.errors import TrainingError


def quantize_base(base: nn.Module) -> None:
    """Quantize the weights of a base's linear layers to int8 with torchao, with one scale per output channel.

    Each pass, forward or backward, dequantizes them to the dtype of the layer's input. Between the passes only the
    int8 weights exist. Convolutions, norms and biases are not quantized.

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
    for module in base.modules():
        if type(module) is nn.Linear:
            # The class of the instance, as torch's parametrizations do, so that the module stays where it is.
            module.__class__ = QuantizedLinear


class QuantizedLinear(nn.Linear):
    """Frozen linear layer with a quantized weight, of which autograd keeps no dequantized copy."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map `(..., in_features)` to `(..., out_features)`; the gradient reaches the input alone."""
        output: torch.Tensor = _QuantizedProduct.apply(input, self.weight, self.bias)
        return output


class _QuantizedProduct(torch.autograd.Function):
    """Linear map that dequantizes its weight again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grad @ weight.dequantize(grad.dtype), None, None


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
