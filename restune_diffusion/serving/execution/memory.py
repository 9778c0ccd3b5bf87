"""Estimate of the memory that a U-Net call and a decoding take, from the configs of the models."""

from __future__ import annotations

from typing import Any

from .job import Size

# Feature maps of the finest level that are alive at once besides the skip connections: the input and the output of a
# layer, the concatenation with a skip feature, and the widened feed-forward layer.
_LIVE_MAPS = 14
# The same of the decoder, in feature maps of its second finest level at full resolution.
_LIVE_DECODER_MAPS = 4


def row_bytes(unet: Any, size: Size) -> int:
    """Return the bytes of activations that one row takes in a U-Net call.

    Args:
        unet: the U-Net.
        size: height and width of the latents.
    """
    channels, layers = unet.config.block_out_channels, unet.config.layers_per_block
    layers = [layers] * len(channels) if isinstance(layers, int) else layers
    positions, values = size[0] * size[1], 0
    for level, (width, count) in enumerate(zip(channels, layers, strict=True)):
        here = positions // 4**level
        values += here * width * count
        if level + 1 < len(channels):
            values += here // 4 * width
    values += positions * channels[0] * (1 + _LIVE_MAPS)
    return int(values * _item_bytes(unet))


def decoding_bytes(vae: Any, size: Size, scale: int) -> int:
    """Return the bytes of activations that decoding one image takes.

    Args:
        vae: the VAE.
        size: height and width of the latents.
        scale: pixels per position of the latents.
    """
    channels = vae.config.block_out_channels
    width = channels[min(1, len(channels) - 1)]
    return int(size[0] * size[1] * scale**2 * width * _LIVE_DECODER_MAPS * _item_bytes(vae))


def _item_bytes(model: Any) -> int:
    return int(model.dtype.itemsize)
