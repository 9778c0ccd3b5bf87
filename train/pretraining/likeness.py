"""How far a drawing's colours and strokes are from those of the artist's own picture, wherever they are in it."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from train.pretraining.folders import decoder_folder
from train.pretraining.icons import load_icons, on_background
from train.pretraining.layers import double_by_copies

COLOUR_WAYS, STROKE_WAYS = 8, 16


def sliced_distance(found: Tensor, wanted: Tensor, ways: int) -> Tensor:
    """Mean distance of two sets of points by their orders along random directions (sliced Wasserstein, Rabin 2011).

    Args:
        found: N x C x P, P points of C coordinates.
        wanted: the same.
        ways: how many directions torch's generator draws.
    """
    directions = F.normalize(torch.randn(ways, found.shape[1]), dim=1)
    first, second = (torch.einsum("wc,ncp->nwp", directions, points).sort(2).values for points in (found, wanted))
    return (first - second).abs().mean()


def distance(found: Tensor, wanted: Tensor) -> Tensor:
    """The distance of pictures, N x 3 x H x W: their pixels at three sizes, and their 3x3 patches at two."""
    parts = []
    for level in range(3):
        parts.append(sliced_distance(found.flatten(2), wanted.flatten(2), COLOUR_WAYS))
        if level < 2:
            parts.append(sliced_distance(F.unfold(found, 3), F.unfold(wanted, 3), STROKE_WAYS))
            found, wanted = F.avg_pool2d(found, 2), F.avg_pool2d(wanted, 2)
    return torch.stack(parts).mean()


class Likeness:
    """The distance of drawings from the true pictures of the same concepts by the same artists."""

    def __init__(self, settings: argparse.Namespace) -> None:
        vae = AutoencoderKL.from_pretrained(decoder_folder(settings.work))
        self.vae = vae.eval().requires_grad_(False)
        double_by_copies(self.vae)
        self.pixels = load_icons(settings.icons).pixels

    def __call__(self, drawn: Tensor, picks: Tensor) -> Tensor:
        """The mean distance of scaled latents, N x 16 x 8 x 8, from the icons at N indices, on white."""
        pictures = self.vae.decode(drawn / self.vae.config.scaling_factor).sample
        return distance(pictures, on_background(self.pixels[picks], torch.ones(len(picks), 3)))
