"""A module's parameters as one flat tensor, for sharing between processes and for the optimizer."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Flat:
    """Layout of a module's parameters in one flat tensor."""

    def __init__(self, module: nn.Module) -> None:
        self.names, self.shapes, self.offsets = [], [], []
        self.size = 0
        for name, parameter in module.named_parameters():
            self.names.append(name)
            self.shapes.append(parameter.shape)
            self.offsets.append(self.size)
            self.size += -(-parameter.numel() // 32) * 32  # aligned for the convolution kernels

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Return views into a flat tensor, keyed by parameter name."""
        slices = zip(self.names, self.shapes, self.offsets, strict=True)
        return {name: flat[start : start + shape.numel()].view(shape) for name, shape, start in slices}

    @torch.no_grad()
    def gather(self, module: nn.Module) -> Tensor:
        """Return a flat float32 copy of a module's parameters."""
        flat = torch.zeros(self.size)
        views = self.views(flat)
        for name, parameter in module.named_parameters():
            views[name].copy_(parameter)
        return flat

    def bind(self, module: nn.Module, values: Tensor, gradients: Tensor) -> None:
        """Replace the storage of a module's parameters and gradients with flat tensors."""
        value_views, gradient_views = self.views(values), self.views(gradients)
        for name, parameter in module.named_parameters():
            parameter.data, parameter.grad = value_views[name], gradient_views[name]
