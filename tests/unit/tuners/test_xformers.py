"""Tuners in parallel to attention under diffusers' xformers processor, compared with its SDPA and plain processors.

xformers is for CUDA. 0.0.20 and 0.0.21 have an operator that runs on a CPU as well, 0.0.22 no longer: to run this
file without a GPU, build `xformers._C` of 0.0.21 from its `csrc/attention/attention.cpp` and
`csrc/attention/cpu/small_k.cpp` alone, which compile unchanged against torch 2.13, and put it with the package's
Python files into an environment of its own. Where the installed xformers, if any, has no operator for the machine, the
tests are skipped.
"""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor

from restune_diffusion import Tuner, attach

from ...conftest import make_unet, randomize
from .test_processors import ACTING, everywhere

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the largest value: what float32 leaves of a whole U-Net in which only the order of sums differs.
ACCURACY = 1e-5


@pytest.fixture
def calls(monkeypatch):
    """Whether each call of xformers had a mask."""
    ops = pytest.importorskip("xformers.ops", reason='xformers is not installed: pip install -e ".[cuda]"')
    attend = ops.memory_efficient_attention
    probe = torch.zeros(1, 8, 8, device=DEVICE)
    try:
        attend(probe, probe, probe)
    except NotImplementedError:
        pytest.skip(f"the installed xformers has no operator for float32 on {DEVICE}")
    recorded = []

    def recording(query, key, value, attn_bias=None, *, scale=None, **options):
        recorded.append(attn_bias is not None)
        if DEVICE == "cpu":
            # This operator knows one scale, the usual one, and refuses to be told.
            assert scale == query.shape[-1] ** -0.5
            scale = None
        return attend(query, key, value, attn_bias=attn_bias, scale=scale, **options)

    monkeypatch.setattr(ops, "memory_efficient_attention", recording)
    # Rounding to TF32 in convolutions would make more of a difference in the last bit than there is.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return recorded


def setting(config, hidden_words=False, std=0.3):
    """A U-Net with a tuner that acts, and keyword arguments of a call, in which some words may be hidden."""
    unet = make_unet().to(DEVICE)
    tuner = Tuner.for_base(unet, config)
    randomize(tuner, std=std)
    generator = torch.Generator().manual_seed(1)
    # xformers wants the rows of a mask aligned to 16 bytes, so there are 8 words.
    call = {
        "sample": torch.randn(2, 4, 16, 16, generator=generator).to(DEVICE),
        "timestep": torch.tensor(321),
        "encoder_hidden_states": torch.randn(2, 8, 32, generator=generator).to(DEVICE),
    }
    if hidden_words:
        words = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]])
        call["encoder_attention_mask"] = words.to(DEVICE)
    return unet, tuner.to(DEVICE), call


def difference(one, other):
    """The largest difference, as a share of the largest value."""
    return ((one - other).abs().max() / other.abs().max()).item()


@pytest.mark.parametrize("hidden_words", [False, True])
@pytest.mark.parametrize(("kind", "gate"), ACTING)
def test_xformers_gives_what_sdpa_and_plain_attention_give(kind, gate, hidden_words, calls):
    unet, tuner, call = setting(everywhere(kind, gate), hidden_words)
    outputs = {}
    with torch.no_grad():
        plain = unet(**call).sample
        with attach(unet, tuner):
            for processor in (AttnProcessor2_0(), AttnProcessor(), XFormersAttnProcessor()):
                assert not calls
                unet.set_attn_processor(processor)
                outputs[type(processor)] = unet(**call).sample
    assert len(calls) == len(unet.attn_processors)
    assert any(calls) == hidden_words
    sdpa = outputs[AttnProcessor2_0]
    assert difference(sdpa, plain) > 1000 * ACCURACY
    assert difference(outputs[AttnProcessor], sdpa) < ACCURACY
    assert difference(outputs[XFormersAttnProcessor], sdpa) < ACCURACY


@pytest.mark.parametrize(("kind", "gate"), ACTING)
def test_a_tuner_learns_the_same_under_xformers(kind, gate, calls):
    # Weaker than above: at 0.3 the gradients of lora and attention in float32 are 2e-5 off those in float64 by
    # themselves.
    unet, tuner, call = setting(everywhere(kind, gate), std=0.1)
    gradients = []
    with attach(unet, tuner):
        for processor in (AttnProcessor2_0(), XFormersAttnProcessor()):
            assert not calls
            unet.set_attn_processor(processor)
            tuner.zero_grad()
            unet(**call).sample.square().mean().backward()
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in tuner.parameters()]))
    assert len(calls) == len(unet.attn_processors)
    assert difference(gradients[1], gradients[0]) < ACCURACY


@pytest.mark.skipif(DEVICE == "cpu", reason="diffusers refuses to switch xformers on without CUDA")
@pytest.mark.parametrize("kind", ["adapter", "prefix", "lora"])
def test_xformers_can_be_switched_on_before_and_after_attaching(kind, calls):
    unet, tuner, call = setting(everywhere(kind))
    with torch.no_grad():
        with attach(unet, tuner):
            expected = unet(**call).sample
            unet.enable_xformers_memory_efficient_attention()
            calls.clear()
            switched_after = unet(**call).sample
        assert len(calls) == len(unet.attn_processors)
        with attach(unet, tuner):
            switched_before = unet(**call).sample
            unet.disable_xformers_memory_efficient_attention()
            calls.clear()
            switched_off = unet(**call).sample
        assert not calls
    for output in (switched_after, switched_before, switched_off):
        assert difference(output, expected) < ACCURACY
