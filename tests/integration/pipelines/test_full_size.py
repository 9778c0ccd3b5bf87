"""The promises at Stable Diffusion 1.5's real size, on random weights."""

import gc

import pytest
import torch
from diffusers import UNet2DConditionModel

from restune_diffusion import BypassConfig, SkipConfig, Tuner, attach

from ...conftest import SD15, make_inputs, randomize


@pytest.fixture(scope="module")
def full_unet():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15)
    unet = unet.to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        # sampled once per tensor size, with a scale that keeps activations from vanishing or exploding
        parameter.data.uniform_(-0.02, 0.02, generator=generator)
    yield unet
    gc.collect()


def test_fresh_and_detached_tuners_leave_sd15_as_it_is(full_unet):
    assert sum(parameter.numel() for parameter in full_unet.parameters()) == 859_520_964
    inputs = make_inputs(batch=1, size=32, text_width=768)
    with torch.no_grad():
        plain = full_unet(*inputs).sample
        assert plain.isfinite().all()
        assert plain.std() > 0
        for config in (SkipConfig(ratio=1.0), BypassConfig()):
            tuner = Tuner.for_base(full_unet, config, generator=torch.Generator().manual_seed(0))
            with attach(full_unet, tuner):
                assert torch.equal(full_unet(*inputs).sample, plain)
                randomize(tuner, std=0.05)
                assert not torch.equal(full_unet(*inputs).sample, plain)
            assert torch.equal(full_unet(*inputs).sample, plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in full_unet.modules())
