"""Changes of a base with tuners attached: a tuner acts as before, or the call is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from restune_diffusion import ResConfig, RestuneError, SkipConfig, Tuner, attach, merge_lora
from restune_diffusion.backbones import describe_base
from restune_diffusion.hooks.manager import TunerManager

from ...conftest import make_inputs, make_unet, randomize

LORA = ResConfig(self_attention="lora", cross_attention="lora", feed_forward=None, width=4)


@pytest.fixture(scope="module")
def blank():
    return make_unet()


@pytest.fixture
def unet(blank):
    return copy.deepcopy(blank)


def predict(unet):
    with torch.no_grad():
        return unet(*make_inputs()).sample


def tuner_for(unet, config=LORA):
    tuner = Tuner.for_base(unet, config)
    randomize(tuner)
    return tuner


@pytest.mark.parametrize("first", ["attach", "fuse"])
def test_fused_projections_are_refused_and_unfused_ones_fit(unet, first):
    base, tuner = predict(unet), tuner_for(unet)
    described = describe_base(unet)
    if first == "attach":
        attached = attach(unet, tuner)
        tuned = predict(unet)
        unet.fuse_qkv_projections()
    else:
        with attach(unet, tuner):
            tuned = predict(unet)
        unet.fuse_qkv_projections()
        assert describe_base(unet) == described
        attached = attach(unet, tuner)
    assert (tuned - base).abs().max() > 1e-2
    with pytest.raises(RestuneError, match=r"projections of the base are fused.*unfuse_qkv_projections"):
        predict(unet)
    unet.unfuse_qkv_projections()
    assert torch.equal(predict(unet), tuned)
    attached.detach()
    assert torch.equal(predict(unet), base)
    with attach(unet, tuner):
        assert torch.equal(predict(unet), tuned)


@pytest.mark.parametrize(
    "config",
    [
        SkipConfig(ratio=0.2),
        ResConfig(self_attention="adapter", feed_forward=None),
        ResConfig(self_attention="prefix", feed_forward=None),
        ResConfig(self_attention=None, feed_forward="lora"),
    ],
    ids=["skip", "adapter", "prefix", "feed-forward"],
)
def test_tuners_beside_projections_act_on_fused_ones(unet, config):
    with attach(unet, tuner_for(unet, config)):
        tuned = predict(unet)
        unet.fuse_qkv_projections()
        torch.testing.assert_close(predict(unet), tuned, rtol=0, atol=1e-5)


def test_an_inactive_tuner_does_not_refuse_fused_projections(unet):
    base = predict(unet)
    with attach(unet, tuner_for(unet), weight=0.0):
        unet.fuse_qkv_projections()
        torch.testing.assert_close(predict(unet), base, rtol=0, atol=1e-5)


def test_fused_projections_are_neither_merged_nor_unmerged(unet):
    tuner, before = tuner_for(unet), copy.deepcopy(unet.state_dict())
    unet.fuse_qkv_projections()
    with pytest.raises(RestuneError, match="fused projection"):
        merge_lora(unet, tuner)
    assert all(torch.equal(before[key], value) for key, value in unet.state_dict().items() if key in before)
    unet.unfuse_qkv_projections()
    merged = merge_lora(unet, tuner)
    unet.fuse_qkv_projections()
    with pytest.raises(RestuneError, match="fused projection"):
        merged.unmerge()
    unet.unfuse_qkv_projections()
    merged.unmerge()
    assert all(torch.equal(before[key], value) for key, value in unet.state_dict().items() if key in before)


def replace(parent, name, change):
    parent._modules[name] = change(parent._modules[name])


CHANGES = {
    "mid block": lambda unet: replace(unet, "mid_block", copy.deepcopy),
    "up block": lambda unet: replace(unet.up_blocks, "1", copy.deepcopy),
    "head": lambda unet: replace(unet, "conv_norm_out", copy.deepcopy),
    "attention": lambda unet: replace(unet.mid_block.attentions[0].transformer_blocks[0], "attn1", copy.deepcopy),
    "layer": lambda unet: replace(unet.mid_block.attentions[0].transformer_blocks[0].attn2, "to_q", copy.deepcopy),
    "quantized": lambda unet: torch.ao.quantization.quantize_dynamic(unet, {nn.Linear}, inplace=True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
def test_replaced_modules_are_named(unet, change):
    with attach(unet, tuner_for(unet)):
        CHANGES[change](unet)
        with pytest.raises(RestuneError, match="of the base was replaced after a tuner was loaded"):
            predict(unet)
    if change != "quantized":
        with attach(unet, tuner_for(unet)):
            predict(unet)


HARMLESS = {
    "processor": lambda unet: unet.set_attn_processor(AttnProcessor()),
    "sliced": lambda unet: unet.set_attention_slice(1),
    "freeu": lambda unet: (unet.enable_freeu(1.0, 1.0, 1.0, 1.0), unet.disable_freeu()),
}


@pytest.mark.parametrize("change", HARMLESS)
def test_a_tuner_acts_after_other_changes(unet, change):
    with attach(unet, tuner_for(unet)):
        tuned = predict(unet)
        HARMLESS[change](unet)
        torch.testing.assert_close(predict(unet), tuned, rtol=0, atol=1e-5)


def test_a_compiled_block_is_the_same_block(unet):
    with attach(unet, tuner_for(unet)):
        replace(unet, "mid_block", torch.compile)
        TunerManager.of(unet).check_modules()


def test_a_copy_of_a_base_watches_its_own_modules(unet):
    with attach(unet, tuner_for(unet)):
        twin, tuned = copy.deepcopy(unet), predict(unet)
        assert torch.equal(predict(twin), tuned)
        twin.fuse_qkv_projections()
        assert torch.equal(predict(unet), tuned)
        with pytest.raises(RestuneError, match="fused"):
            predict(twin)


def test_a_tuner_acts_in_another_dtype(unet):
    with attach(unet, tuner_for(unet)):
        tuned = predict(unet)
        unet.to(torch.float64)
        x, t, text = make_inputs()
        with torch.no_grad():
            again = unet(x.double(), t, text.double()).sample
    torch.testing.assert_close(again.float(), tuned, rtol=1e-3, atol=1e-3)
