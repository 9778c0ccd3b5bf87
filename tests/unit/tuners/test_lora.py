"""lora against PEFT's, and merged against attached."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from restune_diffusion import BaseMismatchError, ResConfig, RestuneError, SkipConfig, Tuner, attach, merge_lora
from restune_diffusion.backbones import site_module
from restune_diffusion.backbones.unet import module_path
from restune_diffusion.tuners.lora import ResLora

from ...conftest import make_inputs, make_unet, randomize

EVERYWHERE = ResConfig(self_attention=None, feed_forward=None, block="lora", width=4, alpha=2.0)
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]


def make_tuner(unet, config=EVERYWHERE, seed=0, std=0.3):
    tuner = Tuner.for_base(unet, config)
    randomize(tuner, seed, std)
    return tuner


def test_lora_is_its_equation_and_its_delta_is_the_weight_that_it_adds():
    lora = ResLora(6, 5, width=3, alpha=1.5).double()
    randomize(lora, std=1.0)
    x = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = 0.5 * torch.einsum("or,ri,bti->bto", lora.up.weight, lora.down.weight, x)
    torch.testing.assert_close(lora(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(x @ lora.delta().T, expected, rtol=0, atol=1e-12)
    assert ResLora(6, 5, width=3).factor == 1.0
    assert lora.half().delta().dtype == torch.float32
    assert not lora.delta().requires_grad


def test_outputs_and_gradients_are_those_of_peft():
    inputs = [x.double() if x.is_floating_point() else x for x in make_inputs()]
    unet, peft_unet = make_unet().double(), make_unet().double()
    tuner = make_tuner(unet).double()
    peft_unet.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=TARGETS))
    peft_unet.double()
    loras = next(tuner.parts()).loras()
    assert len(loras) == sum("lora_A.default" in name for name, _ in peft_unet.named_parameters())
    with torch.no_grad():
        for site, lora in loras.items():
            layer = peft_unet.get_submodule(module_path(site))
            layer.lora_A["default"].weight.copy_(lora.down.weight)
            layer.lora_B["default"].weight.copy_(lora.up.weight)
    expected = peft_unet(*inputs).sample
    expected.square().mean().backward()
    with attach(unet, tuner):
        output = unet(*inputs).sample
    output.square().mean().backward()
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    assert (unet(*inputs).sample - output).abs().max() > 0.1
    for site, lora in loras.items():
        layer = peft_unet.get_submodule(module_path(site))
        for ours, theirs in ((lora.down, layer.lora_A["default"]), (lora.up, layer.lora_B["default"])):
            assert ours.weight.grad.any()
            torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weight", [1.0, -0.5])
def test_merged_is_attached_and_unmerged_is_untouched(unet, inputs, weight):
    tuner = make_tuner(unet)
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    plain = unet(*inputs).sample
    merged = merge_lora(unet, tuner, weight)
    output = unet(*inputs).sample
    merged.unmerge()
    with attach(unet, tuner, weight=weight):
        torch.testing.assert_close(output, unet(*inputs).sample, rtol=1e-5, atol=1e-5)
    assert (output - plain).abs().max() > 0.05
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())
    with pytest.raises(RestuneError, match="already unmerged"):
        merged.unmerge()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_in_any_precision_come_back_bit_for_bit(unet, dtype):
    unet.to(dtype)
    wide = dtype if dtype == torch.float64 else torch.float32
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    tuner = make_tuner(unet)
    merged = merge_lora(unet, tuner)
    site, lora = next(iter(next(tuner.parts()).loras().items()))
    weight = site_module(unet, site).weight
    old = before[next(key for key, value in unet.state_dict().items() if value.data_ptr() == weight.data_ptr())]
    assert torch.equal(weight, (old.to(wide) + lora.delta()).to(dtype))
    changed = [key for key, value in unet.state_dict().items() if not torch.equal(value, before[key])]
    assert len(changed) == len(next(tuner.parts()).loras())
    merged.unmerge()
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())
    assert all(value.dtype == dtype for value in unet.state_dict().values())


def test_two_tuners_come_out_in_the_reverse_order_only(unet):
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    first, second = (merge_lora(unet, make_tuner(unet, seed=seed)) for seed in (0, 1))
    both = {key: value.clone() for key, value in unet.state_dict().items()}
    with pytest.raises(RestuneError, match=r"to_q was changed after this tuner was merged; undo that change first"):
        first.unmerge()
    assert all(torch.equal(value, both[key]) for key, value in unet.state_dict().items())
    second.unmerge()
    first.unmerge()
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


def test_it_merges_into_the_layer_that_peft_has_wrapped(unet, inputs):
    plain = unet(*inputs).sample
    other = make_unet()
    expected_merge = merge_lora(other, make_tuner(other))
    expected = other(*inputs).sample
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "net.2"]))
    merged = merge_lora(unet, make_tuner(unet))
    torch.testing.assert_close(unet(*inputs).sample, expected)
    merged.unmerge()
    expected_merge.unmerge()
    torch.testing.assert_close(unet(*inputs).sample, plain)


@pytest.mark.parametrize(
    ("configs", "place"),
    [
        ((ResConfig(self_attention="lora", feed_forward="adapter"),), r"down.0.attn.0.block.0.ff"),
        ((EVERYWHERE, SkipConfig(ratio=0.1)), r"skip.0"),
        ((SkipConfig(ratio=0.1),), r"skip.0"),
    ],
)
def test_only_lora_merges(unet, configs, place):
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    with pytest.raises(
        RestuneError, match=rf"Only lora can be merged, .* another type of tuner at {place}; attach it"
    ):
        merge_lora(unet, Tuner.for_base(unet, *configs))
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


def test_what_cannot_be_merged_is_refused_and_nothing_has_changed(unet):
    tuner = make_tuner(unet)
    with pytest.raises(BaseMismatchError):
        merge_lora(make_unet(cross_attention_dim=48), tuner)
    with pytest.raises(RestuneError, match="must be a finite number"):
        merge_lora(unet, tuner, float("nan"))
    with attach(unet, tuner), pytest.raises(RestuneError, match="attached to the base and would act twice; detach it"):
        merge_lora(unet, tuner)
    layer = site_module(unet, "up.3.attn.2.block.0.ff.net.2")
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    whole = layer.weight
    for stored, message in (
        (whole.to(torch.int8), r"quantized \(torch.int8\)"),
        (whole.to(torch.float8_e4m3fn), r"quantized \(torch.float8_e4m3fn\)"),
        (whole.to("meta"), "offloaded"),
    ):
        layer.weight = torch.nn.Parameter(stored, requires_grad=False)
        with pytest.raises(RestuneError, match=rf"up.3.*net.2 is {message} and cannot be changed; attach the tuner"):
            merge_lora(unet, tuner)
    layer.weight = whole
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())
