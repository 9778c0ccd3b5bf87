"""Prefix and prompt against attention over concatenated keys and values, as diffusers computes it."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch.nn.functional import scaled_dot_product_attention

from restune_diffusion.tuners import Operation
from restune_diffusion.tuners.prefix import AttentionPrefix, PlainPrefix
from restune_diffusion.tuners.prompt import AttentionPrompt, PlainPrompt

from ...conftest import randomize
from .operations import CHANNELS, CONTEXT, HEAD_WIDTH, HEADS, PrependingProcessor, frozen, make_attention, randn

BATCH, QUERIES, WORDS, LENGTH = 2, 6, 5, 4
EXACT = {"rtol": 0, "atol": 1e-12}


def make_mask(kind, keys):
    """Scores to add `(batch, 1 or queries, keys)`: some keys all but hidden, others shifted."""
    if kind is None:
        return None
    rows = {"keys": 1, "queries and keys": QUERIES}[kind]
    mask = randn(BATCH, rows, keys, seed=7)
    mask[0, :, 1], mask[1, :, 2:] = -10000.0, -10000.0
    return mask


def setting(cross, mask_kind):
    attention = make_attention(cross)
    x, context = randn(BATCH, QUERIES, CHANNELS, seed=1), randn(BATCH, WORDS, CONTEXT, seed=2) if cross else None
    mask = make_mask(mask_kind, WORDS if cross else QUERIES)
    operation = Operation(context, None if mask is None else mask[:, None], frozen(attention))
    return attention, x, context, mask, operation


def act(tuner):
    """Give a tuner tokens that matter, and the factor that makes the exact gate exact."""
    randomize(tuner, seed=3, std=1.0)
    with torch.no_grad():
        tuner.scale.fill_(1.0)
    return tuner


def make_prefix(gate="exact", scale="scalar"):
    return act(AttentionPrefix(CHANNELS, HEADS, HEAD_WIDTH, HEAD_WIDTH, LENGTH, gate, scale).double())


def make_prompt(cross, gate="exact"):
    return act(AttentionPrompt(CHANNELS, CONTEXT if cross else CHANNELS, LENGTH, gate).double())


@pytest.mark.parametrize("mask_kind", [None, "keys", "queries and keys"])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_an_exact_prefix_is_attention_over_concatenated_keys_and_values(cross, mask_kind):
    attention, x, context, mask, operation = setting(cross, mask_kind)
    plain = attention(x, context, attention_mask=mask)
    prefix = make_prefix()
    attention.set_processor(PrependingProcessor(prefix.key, prefix.value))
    together = attention(x, context, attention_mask=mask)
    torch.testing.assert_close(plain + prefix(x, operation), together, **EXACT)
    assert (together - plain).abs().max() > 0.05


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
@pytest.mark.parametrize("mask_kind", [None, "keys", "queries and keys"])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_an_exact_prompt_is_attention_that_reads_the_tokens_too(cross, mask_kind, processor):
    attention, x, context, mask, operation = setting(cross, mask_kind)
    attention.set_processor(processor())
    plain = attention(x, context, attention_mask=mask)
    prompt = make_prompt(cross)
    tokens = prompt.tokens[None].repeat(BATCH, 1, 1)
    longer = None if mask is None else torch.nn.functional.pad(mask, (LENGTH, 0))
    together = attention(x, torch.cat([tokens, x if context is None else context], dim=1), attention_mask=longer)
    torch.testing.assert_close(plain + prompt(x, operation), together, **EXACT)
    assert (together - plain).abs().max() > 0.05


@pytest.mark.parametrize("mask_kind", [None, "queries and keys"])
def test_the_exact_gate_is_the_sigmoid_of_the_difference_of_the_log_sums(mask_kind):
    _, x, context, mask, operation = setting(True, mask_kind)
    prefix, own = make_prefix(), operation.attention
    query, key, value = own.query(x), own.key(context), own.value(context)
    scores = query @ key.transpose(2, 3) / HEAD_WIDTH**0.5
    if mask is not None:
        scores = scores + mask[:, None]
    trained = torch.einsum("bhqd,lhd->bhql", query, prefix.key) / HEAD_WIDTH**0.5
    lam = torch.sigmoid(trained.logsumexp(-1) - scores.logsumexp(-1))[..., None]
    seen = torch.einsum("bhql,lhd->bhqd", trained.softmax(-1), prefix.value)
    moved = lam * (seen - scores.softmax(-1) @ value)
    torch.testing.assert_close(prefix(x, operation), own.output(moved.transpose(1, 2).flatten(2)), **EXACT)
    assert lam.min() < 0.4 < 0.6 < lam.max(), "every head and query has its own gate"


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_the_scale_gate_leaves_the_frozen_softmax_alone(cross):
    _, x, _, _, operation = setting(cross, "keys")
    own = operation.attention
    for tuner, key, value in (
        ((prefix := make_prefix("scale")), prefix.key.transpose(0, 1), prefix.value.transpose(0, 1)),
        ((prompt := make_prompt(cross, "scale")), own.key(prompt.tokens[None])[0], own.value(prompt.tokens[None])[0]),
    ):
        weights = (own.query(x) @ key.transpose(1, 2) / HEAD_WIDTH**0.5).softmax(-1)
        expected = own.output((weights @ value).transpose(1, 2).flatten(2))
        torch.testing.assert_close(tuner(x, operation), expected, **EXACT)


def test_a_mask_that_is_one_number_for_all_keys_shifts_them_against_the_prefix():
    attention, x, context, _, _ = setting(True, None)
    prefix = make_prefix()
    shifted = prefix(x, Operation(context, torch.full((1, 1, 1, 1), -3.0), frozen(attention)))
    full = torch.full((BATCH, HEADS, QUERIES, WORDS), -3.0).double()
    torch.testing.assert_close(shifted, prefix(x, Operation(context, full, frozen(attention))), **EXACT)
    assert (shifted - prefix(x, Operation(context, None, frozen(attention)))).abs().max() > 0.01


@pytest.mark.parametrize("gate", ["exact", "scale"])
def test_a_scale_for_each_channel_multiplies_the_output(gate):
    _, x, _, _, operation = setting(True, None)
    scalar, channel = make_prefix(gate), make_prefix(gate, "channel")
    channel.key, channel.value = scalar.key, scalar.value
    factors = randn(CHANNELS, seed=5)
    channel.scale = torch.nn.Parameter(factors)
    torch.testing.assert_close(channel(x, operation), scalar(x, operation) * factors, **EXACT)


def attend(x, key, value, heads):
    """Attention of layer-normed tokens to `(length, heads, width)` keys and values, one head after the other."""
    normal = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    width, outputs = x.shape[-1] // heads, []
    for head in range(heads):
        query = normal[..., head * width : (head + 1) * width]
        weights = (query @ key[:, head].T / width**0.5).softmax(-1)
        outputs.append(weights @ value[:, head])
    return torch.cat(outputs, -1)


def test_beside_other_operations_the_normalised_input_is_the_query():
    x = randn(BATCH, QUERIES, CHANNELS, seed=1)
    prefix = act(PlainPrefix(CHANNELS, 4, LENGTH).double())
    torch.testing.assert_close(prefix(x, Operation()), attend(x, prefix.key, prefix.value, 4), **EXACT)
    prompt = act(PlainPrompt(CHANNELS, 4, LENGTH, "channel").double())
    tokens = prompt.tokens.unflatten(-1, (4, -1))
    prompt.scale = torch.nn.Parameter(randn(CHANNELS, seed=5))
    torch.testing.assert_close(prompt(x, Operation()), attend(x, tokens, tokens, 4) * prompt.scale, **EXACT)


@pytest.mark.parametrize("gate", ["exact", "scale"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_tuner_in_fp32_stands_beside_a_base_in_half_precision(dtype, gate):
    attention, x, context, mask, operation = setting(True, "keys")
    tuners = make_prefix(gate), make_prompt(True, gate)
    expected = [tuner(x, operation) for tuner in tuners]
    half = Operation(context.to(dtype), mask[:, None].to(dtype), frozen(attention.to(dtype)))
    for tuner, residual in zip(tuners, expected, strict=True):
        found = tuner.float()(x.to(dtype), half)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), residual, rtol=0, atol=0.02 if dtype == torch.float16 else 0.1)


def difference_of_two_attentions(prefix, x, operation):
    """Residual of an exact prefix as the change of the attention when the prefix is added to its keys and values."""
    own, source = operation.attention, x if operation.context is None else operation.context
    query, keys, values = own.query(x), [own.key(source)], [own.value(source)]
    plain = scaled_dot_product_attention(query, keys[0], values[0])
    key, value = (each.expand(len(x), -1, -1, -1) for each in prefix.keys_and_values())
    together = scaled_dot_product_attention(query, torch.cat([key, *keys], 2), torch.cat([value, *values], 2))
    return own.output((together - plain).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_in_fp32_the_exact_gate_is_the_difference_of_two_attentions(cross):
    attention, x, context, _, _ = setting(cross, None)
    operation = Operation(None if context is None else context.float(), None, frozen(attention.float()))
    prefix, x = make_prefix().float(), x.float()
    expected = difference_of_two_attentions(prefix, x, operation)
    torch.testing.assert_close(prefix(x, operation), expected, rtol=0, atol=1e-5)
    assert expected.abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_the_exact_gate_is_not_lost_among_many_keys(dtype):
    attention, tokens = make_attention(False), 1024
    with torch.no_grad():
        for layer in (attention.to_q, attention.to_k, attention.to_v):
            layer.weight.copy_(randn(*layer.weight.shape, seed=4) * CHANNELS**-0.5)
    x, prefix = randn(1, tokens, CHANNELS, seed=1), make_prefix()
    errors = []
    half, narrow = copy.deepcopy(attention).to(dtype), copy.deepcopy(prefix).to(dtype)
    # The same rounded numbers for both.
    expected = difference_of_two_attentions(
        narrow.double(), x.to(dtype).double(), Operation(None, None, frozen(copy.deepcopy(half).double()))
    )
    narrow = narrow.to(dtype)
    for residual in (narrow, lambda *inputs: difference_of_two_attentions(narrow, *inputs)):
        found = residual(x.to(dtype), Operation(None, None, frozen(half))).double()
        errors.append(((found - expected).norm() / expected.norm()).item())
    assert errors[0] < 8 * torch.finfo(dtype).eps
    assert errors[1] > 4 * errors[0], "the difference of two attentions"
