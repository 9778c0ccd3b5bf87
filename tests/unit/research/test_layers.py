import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.upsampling import Upsample2D
from torch import nn

from research.restune_tiny.parts.layers import SharedTextAttention, double_by_copies


@pytest.mark.parametrize("use_conv", [False, True])
def test_copies_equal_nearest_interpolation(use_conv):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 6, 1), Upsample2D(6, use_conv=use_conv), Upsample2D(6, use_conv=use_conv))
    pictures = torch.randn(2, 3, 4, 5, requires_grad=True)
    expected = module(pictures)
    expected_gradient = torch.autograd.grad(expected.square().sum(), pictures)[0]
    double_by_copies(module)
    found = module(pictures)
    assert not module[1].interpolate
    assert found.shape == (2, 6, 16, 20)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), pictures)[0], expected_gradient)


@pytest.mark.parametrize("captions", [1, 2, 6])
def test_shared_captions_attend_as_repeated_ones(captions):
    torch.manual_seed(0)
    attention = Attention(query_dim=24, cross_attention_dim=12, heads=4, dim_head=8)
    states, text = torch.randn(6, 10, 24), torch.randn(captions, 7, 12)
    attention.set_processor(AttnProcessor())
    expected = attention(states, encoder_hidden_states=text.repeat_interleave(6 // captions, 0))
    attention.set_processor(SharedTextAttention())
    torch.testing.assert_close(attention(states, encoder_hidden_states=text), expected)


def test_self_attention_stays_the_same():
    torch.manual_seed(0)
    attention = Attention(query_dim=24, heads=3, dim_head=8)
    states = torch.randn(4, 10, 24)
    attention.set_processor(AttnProcessor())
    expected = attention(states)
    attention.set_processor(SharedTextAttention())
    torch.testing.assert_close(attention(states), expected)
