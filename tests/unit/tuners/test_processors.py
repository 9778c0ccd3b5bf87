"""Tuners in parallel to attention in a whole U-Net, under each of the base's attention processors.

xformers' processor needs a build of xformers and is not among them: `test_xformers` is about it. Tuners read what an
operation is called on and add to what it returns; which processor ran in between they cannot see.
"""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from torch.nn import functional as F

from restune_diffusion import ResConfig, Tuner, attach
from restune_diffusion.backbones import site_module

from ...conftest import make_inputs, make_unet, randomize
from .operations import PrependingProcessor

KINDS = ("adapter", "prefix", "prompt", "lora", "attention")
ACTING = (*((kind, "scale") for kind in KINDS), ("prefix", "exact"), ("prompt", "exact"))
EXACT = {"rtol": 0, "atol": 1e-12}


def setting(config, **changes):
    """A U-Net with a tuner that acts, and keyword arguments of a call in which some words are hidden."""
    unet = make_unet(**changes).double()
    tuner = Tuner.for_base(unet, config).double()
    randomize(tuner, std=0.3)
    latent, timestep, text = make_inputs()
    words = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]])
    call = {
        "sample": latent.double(),
        "timestep": timestep,
        "encoder_hidden_states": text.double(),
        "encoder_attention_mask": words,
    }
    return unet, tuner, call


def everywhere(kind, gate="scale"):
    beside = None if gate == "exact" else kind
    return ResConfig(self_attention=kind, cross_attention=kind, feed_forward=beside, gate=gate, width=4)


@pytest.mark.parametrize(("kind", "gate"), ACTING)
def test_every_attention_processor_gives_the_same(kind, gate):
    unet, tuner, call = setting(everywhere(kind, gate))
    with attach(unet, tuner):
        outputs = []
        for processor in (AttnProcessor2_0(), AttnProcessor(), SlicedAttnProcessor(2)):
            unet.set_attn_processor(processor)
            outputs.append(unet(**call).sample)
    plain = unet(**call).sample
    assert (outputs[0] - plain).abs().max() > 1e-3
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], **EXACT)


def test_an_exact_prefix_in_a_whole_unet_is_prefix_tuning():
    unet, tuner, call = setting(everywhere("prefix", "exact"))
    part = next(tuner.parts())
    with torch.no_grad():
        for name, parameter in tuner.named_parameters():
            if name.endswith("scale"):
                parameter.fill_(1.0)
    with attach(unet, tuner):
        tuned = unet(**call).sample
    for site in part.writes:
        prefix = part.get_submodule(f"{site}.prefix")
        site_module(unet, site).set_processor(PrependingProcessor(prefix.key, prefix.value))
    torch.testing.assert_close(tuned, unet(**call).sample, **EXACT)


class ReadingTokens(AttnProcessor2_0):
    """diffusers' own attention, with tokens put before what it reads keys and values from."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        longer = torch.cat([self.tokens[None].expand(len(context), -1, -1), context], dim=1)
        mask = None if attention_mask is None else F.pad(attention_mask, (len(self.tokens), 0))
        return super().__call__(attn, hidden_states, longer, mask, **kwargs)


def test_an_exact_prompt_in_a_whole_unet_is_prompt_tuning():
    unet, tuner, call = setting(everywhere("prompt", "exact"))
    part = next(tuner.parts())
    with torch.no_grad():
        for name, parameter in tuner.named_parameters():
            if name.endswith("scale"):
                parameter.fill_(1.0)
    with attach(unet, tuner):
        tuned = unet(**call).sample
    for site in part.writes:
        site_module(unet, site).set_processor(ReadingTokens(part.get_submodule(f"{site}.prompt").tokens))
    torch.testing.assert_close(tuned, unet(**call).sample, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_gradient(kind):
    gradients = []
    for checkpointing in (False, True):
        unet, tuner, call = setting(everywhere(kind))
        unet.train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        with attach(unet, tuner):
            unet(**call).sample.square().mean().backward()
        gradients.append([parameter.grad for parameter in tuner.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.any()
        torch.testing.assert_close(checkpointed, plain, rtol=1e-9, atol=1e-12)
