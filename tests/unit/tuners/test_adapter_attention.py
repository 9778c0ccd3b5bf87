"""Adapter and low-rank attention against their equations, written out."""

from __future__ import annotations

import math

import pytest
import torch

from restune_diffusion.tuners import Operation
from restune_diffusion.tuners.adapter import ResAdapter
from restune_diffusion.tuners.attention import PlainAttention, ResAttention
from restune_diffusion.tuners.gate import attend

from ...conftest import randomize
from .operations import CHANNELS, CONTEXT, randn

EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.mark.parametrize("scale", ["scalar", "channel"])
def test_adapter_is_its_equation(scale):
    tuner = ResAdapter(6, 4, scale).double()
    randomize(tuner, std=1.0)
    x = randn(2, 5, 6)
    expected = torch.empty_like(x)
    for image, token in torch.cartesian_prod(torch.arange(2), torch.arange(5)).tolist():
        hidden = tuner.down.weight @ x[image, token] + tuner.down.bias
        hidden = torch.tensor([0.5 * h * (1 + math.erf(h / math.sqrt(2))) for h in hidden.tolist()]).double()
        expected[image, token] = tuner.scale * (tuner.up.weight @ hidden + tuner.up.bias)
    assert tuner.scale.shape == (() if scale == "scalar" else (6,))
    torch.testing.assert_close(tuner(x), expected, rtol=0, atol=1e-6)


def low_rank_attention(tuner, x, source, mask):
    width = tuner.to_q.out_features // tuner.heads
    query, key, value = x @ tuner.to_q.weight.T, source @ tuner.to_k.weight.T, source @ tuner.to_v.weight.T
    outputs = []
    for head in range(tuner.heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / width**0.5 + mask
        outputs.append(scores.softmax(-1) @ value[..., part])
    return tuner.scale * (torch.cat(outputs, -1) @ tuner.to_out.weight.T)


def make(kind, key_channels, scale="scalar"):
    tuner = kind(CHANNELS, key_channels, 6, 3, scale).double()
    randomize(tuner, std=1.0)
    return tuner


@pytest.mark.parametrize("scale", ["scalar", "channel"])
def test_attention_beside_cross_attention_reads_the_text(scale):
    tuner, x, context = make(ResAttention, CONTEXT, scale), randn(2, 7, CHANNELS), randn(2, 5, CONTEXT, seed=1)
    mask = randn(2, 1, 5, seed=2)
    mask[1, :, 3:] = -10000.0
    expected = low_rank_attention(tuner, x, context, mask)
    torch.testing.assert_close(tuner(x, Operation(context, mask[:, None])), expected, **EXACT)


def test_attention_beside_self_attention_reads_its_input():
    tuner, x = make(ResAttention, CHANNELS), randn(2, 7, CHANNELS)
    torch.testing.assert_close(tuner(x, Operation()), low_rank_attention(tuner, x, x, 0), **EXACT)


def test_attention_beside_another_operation_reads_normalised_tokens_alone():
    tuner, x = make(PlainAttention, CHANNELS), randn(2, 7, CHANNELS)
    normal = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    text = Operation(randn(2, 5, CONTEXT), randn(2, 1, 1, 5))
    torch.testing.assert_close(tuner(x, text), low_rank_attention(tuner, normal, normal, 0), **EXACT)


@pytest.mark.parametrize("mask_shape", [None, (2, 1, 1, 7), (1, 1, 5, 7), (2, 4, 5, 7)], ids=str)
@pytest.mark.parametrize("widths", [(1, 1), (2, 2), (12, 12), (8, 8), (8, 3)], ids=str)
def test_heads_filled_up_with_zeros_attend_as_they_are(widths, mask_shape):
    width, value_width = widths
    query, key, value = (
        randn(2, 4, 5, width, seed=1),
        randn(2, 4, 7, width, seed=2),
        randn(2, 4, 7, value_width, seed=3),
    )
    mask = None if mask_shape is None else randn(*mask_shape, seed=4)
    scores = query @ key.transpose(2, 3) / math.sqrt(width)
    weights = (scores if mask is None else scores + mask).softmax(-1)
    found = attend(query, key, value, mask)
    torch.testing.assert_close(found, weights @ value, **EXACT)
    assert found.shape == (2, 4, 5, value_width)
