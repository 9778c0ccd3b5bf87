"""Several tuners of one shape at a site, computed as one product over the batch.

Tuners that act on all rows are one tuner whose width is the sum of their widths. Otherwise each row of the batch gets
the weights of its own tuners, side by side, and two batched products compute all rows. Both take as many kernels as
one tuner. The weights are copied when the mix changes, in the second case once for each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F

from ..tuners.base import Bottleneck

RowFactors = tuple[float, ...]
"""Factor of each row of the batch, or one factor for all rows."""


class StackedBottlenecks:
    """Bottlenecks of several tuners at one site; the weights are stacked when they are first needed.

    Args:
        layers: the bottlenecks, with the same activation and the same order of dimensions.
    """

    def __init__(self, layers: Sequence[Bottleneck]) -> None:
        self._layers = tuple(layers)
        # Not the parameters themselves, which `load_state_dict(assign=True)` replaces.
        self._places = [
            (module._parameters, name)
            for layer in layers
            for module in (layer.down, layer.up)
            for name in ("weight", "bias")
            if module._parameters[name] is not None
        ]
        self._scales = [layer.scale for layer in layers if isinstance(layer.scale, torch.Tensor)]
        self._key: Any = None
        self._weights: _Weights | None = None

    def residual(self, x: torch.Tensor, factors: tuple[RowFactors, ...]) -> torch.Tensor | None:
        """Return the sum of the weighted residuals, or None if this input cannot be computed in one product.

        Args:
            x: the feature, on the device of the tuners.
            factors: factors of each tuner.
        """
        parameters = [cast("torch.Tensor", found[name]) for found, name in self._places] + self._scales
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
            return None
        if x.dim() != (4 if self._layers[0].channels_first else 3):
            return None
        # A parameter that an optimizer has changed has another version, one that `Tuner.to` has moved another address.
        addresses = [parameter.data_ptr() for parameter in parameters]
        versions = [parameter._version for parameter in parameters if not parameter.is_inference()]
        if (factors, addresses, versions) != self._key:
            with torch.inference_mode(False), torch.no_grad():
                self._weights = _stacked(self._layers, factors)
            self._key = factors, addresses, versions
        weights = self._weights
        if weights is None or (weights.rows is not None and weights.rows != len(x)):
            return None
        return weights(x)


class _Weights:
    """Stacked weights: `(width, channels)` for all rows, or `(rows, width, channels)`."""

    def __init__(
        self,
        down: torch.Tensor,
        down_bias: torch.Tensor | None,
        up: torch.Tensor,
        up_bias: torch.Tensor | None,
        like: Bottleneck,
    ) -> None:
        self.rows = len(down) if down.dim() == 3 else None
        self._gelu, self._channels_first = like.gelu, like.channels_first
        self._down, self._down_bias, self._up, self._up_bias = down, down_bias, up, up_bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self._down.dtype)
        if not self._channels_first:
            return self._tokens(x)
        rows, _, height, width = x.shape
        if self.rows is None:
            hidden = self._activated(F.conv2d(x, self._down[:, :, None, None], self._down_bias))
            return F.conv2d(hidden, self._up[:, :, None, None], self._up_bias)
        if x.is_contiguous():
            hidden = self._activated(_product(self._down, x.flatten(2), self._down_bias, -1))
            return _product(self._up, hidden, self._up_bias, -1).view(rows, -1, height, width)
        y = self._tokens(x.permute(0, 2, 3, 1).flatten(1, 2))
        return y.view(rows, height, width, -1).permute(0, 3, 1, 2)

    def _tokens(self, x: torch.Tensor) -> torch.Tensor:
        if self.rows is None:
            return F.linear(self._activated(F.linear(x, self._down, self._down_bias)), self._up, self._up_bias)
        hidden = self._activated(_product(x, self._down.transpose(1, 2), self._down_bias, 1))
        return _product(hidden, self._up.transpose(1, 2), self._up_bias, 1)

    def _activated(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.gelu(hidden) if self._gelu else hidden


def _product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, dim: int) -> torch.Tensor:
    """Return the batched product with a bias for each row of the batch, which is broadcast along a dimension."""
    return torch.bmm(a, b) if bias is None else torch.baddbmm(bias.unsqueeze(dim), a, b)


def _stacked(layers: Sequence[Bottleneck], factors: tuple[RowFactors, ...]) -> _Weights | None:
    """Return the stacked weights, or None if the layers differ in dtype or device."""
    first = layers[0].down.weight
    if any((layer.down.weight.dtype, layer.down.weight.device) != (first.dtype, first.device) for layer in layers):
        return None
    rows = max(map(len, factors))
    return _side_by_side(layers, factors) if rows == 1 else _by_row(layers, factors, rows)


def _side_by_side(layers: Sequence[Bottleneck], factors: tuple[RowFactors, ...]) -> _Weights:
    scales = [_column(layer) * factor for layer, (factor,) in zip(layers, factors, strict=True)]
    return _Weights(
        torch.cat([layer.down.weight for layer in layers]),
        _joined([layer.down.bias for layer in layers], [layer.down.out_features for layer in layers]),
        torch.cat([layer.up.weight * scale[:, None] for layer, scale in zip(layers, scales, strict=True)], 1),
        _total(layers, scales),
        layers[0],
    )


def _by_row(layers: Sequence[Bottleneck], factors: tuple[RowFactors, ...], rows: int) -> _Weights:
    first = layers[0].down.weight
    acting = [
        [(number, each[row % len(each)]) for number, each in enumerate(factors) if each[row % len(each)]]
        for row in range(rows)
    ]
    most = max(map(len, acting))
    # A row of fewer tuners gets a tuner of zeros, the last one of the tables, with factor zero.
    padded = [[*tuners, *[(len(layers), 0.0)] * (most - len(tuners))] for tuners in acting]
    index = torch.tensor([[number for number, _ in row] for row in padded], device=first.device)
    factor = torch.tensor([[each for _, each in row] for row in padded], device=first.device, dtype=first.dtype)
    width = max(layer.down.out_features for layer in layers)
    down = first.new_zeros(len(layers) + 1, width, first.shape[1])
    up = first.new_zeros(len(layers) + 1, layers[0].up.out_features, width)
    down_bias, up_bias = down.new_zeros(down.shape[:2]), up.new_zeros(up.shape[:2])
    for number, layer in enumerate(layers):
        own, scale = layer.down.out_features, _column(layer)
        down[number, :own] = layer.down.weight
        up[number, :, :own] = layer.up.weight * scale[:, None]
        if layer.down.bias is not None:
            down_bias[number, :own] = layer.down.bias
        if layer.up.bias is not None:
            up_bias[number] = layer.up.bias * scale
    biased = any(layer.down.bias is not None for layer in layers), any(layer.up.bias is not None for layer in layers)
    return _Weights(
        down[index].flatten(1, 2),
        down_bias[index].flatten(1, 2) if biased[0] else None,
        (up[index] * factor[..., None, None]).transpose(1, 2).flatten(2),
        (up_bias[index] * factor[..., None]).sum(1) if biased[1] else None,
        layers[0],
    )


def _column(layer: Bottleneck) -> torch.Tensor:
    """Return the scale of each output channel."""
    weight = layer.up.weight
    return torch.as_tensor(layer.scale, dtype=weight.dtype, device=weight.device).expand(weight.shape[0])


def _joined(biases: Sequence[torch.Tensor | None], widths: Sequence[int]) -> torch.Tensor | None:
    given = [bias for bias in biases if bias is not None]
    if not given:
        return None
    return torch.cat(
        [given[0].new_zeros(width) if bias is None else bias for bias, width in zip(biases, widths, strict=True)]
    )


def _total(layers: Sequence[Bottleneck], scales: Sequence[torch.Tensor]) -> torch.Tensor | None:
    biases = [layer.up.bias * scale for layer, scale in zip(layers, scales, strict=True) if layer.up.bias is not None]
    return torch.stack(biases).sum(0) if biases else None
