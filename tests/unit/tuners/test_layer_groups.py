"""lora on the layers of a U-Net outside its transformer blocks."""

from __future__ import annotations

import pytest
import torch
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel
from peft import LoraConfig

from restune_diffusion import (
    BaseMismatchError,
    ResConfig,
    RestuneError,
    Tuner,
    attach,
    describe_base,
    load_tuner,
    merge_lora,
    read_info,
    save_tuner,
)
from restune_diffusion.backbones import site_module
from restune_diffusion.backbones.unet import module_path
from restune_diffusion.hooks.weights import TunerWeight
from restune_diffusion.utils.errors import SettingsError

from ...conftest import SD15, SDXL, make_inputs, make_unet, randomize

SMALL = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
}
OUTSIDE = ResConfig(
    self_attention=None, feed_forward=None, projections="lora", convolutions="lora", ends="lora",
    width=3, alpha=1.5, conv_width=2, conv_alpha=3.0,
)  # fmt: skip


def small_unet(**changes):
    return make_unet(**SMALL, **changes)


def make_tuner(unet, std=0.2, **changes):
    tuner = Tuner.for_base(unet, OUTSIDE.model_copy(update=changes))
    randomize(tuner, std=std)
    return tuner


@pytest.fixture
def unet():
    return small_unet()


def loras_of(tuner):
    return next(tuner.parts()).loras()


@pytest.mark.parametrize("linear", [False, True])
def test_outputs_and_gradients_are_those_of_peft(linear):
    inputs = [x.double() if x.is_floating_point() else x for x in make_inputs()]
    unet, peft_unet = (small_unet(use_linear_projection=linear).double() for _ in range(2))
    tuner = make_tuner(unet).double()
    loras = loras_of(tuner)
    large = [module_path(site) for site, lora in loras.items() if lora.down.weight.shape[2:] == (3, 3)]
    paths = [module_path(site) for site in loras]
    expected_layers = [
        path
        for path, layer in unet.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and ".transformer_blocks." not in path
    ]
    assert sorted(paths) == sorted(expected_layers)
    assert large
    peft_unet.add_adapter(LoraConfig(r=3, lora_alpha=1.5, target_modules=paths, rank_pattern=dict.fromkeys(large, 2),
                                     alpha_pattern=dict.fromkeys(large, 3.0)))  # fmt: skip
    peft_unet.double()
    with torch.no_grad():
        for site, lora in loras.items():
            layer = peft_unet.get_submodule(module_path(site))
            layer.lora_A["default"].weight.copy_(lora.down.weight)
            layer.lora_B["default"].weight.copy_(lora.up.weight)
    expected = peft_unet(*inputs).sample
    expected.square().mean().backward()
    plain = unet(*inputs).sample
    with attach(unet, tuner):
        output = unet(*inputs).sample
    output.square().mean().backward()
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    assert (plain - output).abs().max() > 0.1
    assert torch.equal(unet(*inputs).sample, plain)
    for site, lora in loras.items():
        layer = peft_unet.get_submodule(module_path(site))
        for ours, theirs in ((lora.down, layer.lora_A["default"]), (lora.up, layer.lora_B["default"])):
            assert ours.weight.grad.any()
            torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-9, atol=1e-12)


def test_a_fresh_tuner_leaves_the_base_as_it_is_and_detaching_restores_it(unet, inputs):
    before, plain = {key: value.clone() for key, value in unet.state_dict().items()}, unet(*inputs).sample
    with attach(unet, Tuner.for_base(unet, OUTSIDE)):
        torch.testing.assert_close(unet(*inputs).sample, plain, rtol=0, atol=0)
    handle = attach(unet, make_tuner(unet))
    assert not torch.equal(unet(*inputs).sample, plain)
    handle.detach()
    assert torch.equal(unet(*inputs).sample, plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


def test_merged_is_attached_and_unmerged_is_untouched(unet, inputs):
    tuner = make_tuner(unet, std=0.1)
    before, plain = {key: value.clone() for key, value in unet.state_dict().items()}, unet(*inputs).sample
    merged = merge_lora(unet, tuner, 0.7)
    output = unet(*inputs).sample
    merged.unmerge()
    with attach(unet, tuner, weight=0.7):
        torch.testing.assert_close(output, unet(*inputs).sample, rtol=1e-5, atol=1e-5)
    assert (output - plain).abs().max() > 0.05
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


def test_each_image_of_a_batch_has_its_weight(unet):
    inputs, tuner = make_inputs(batch=3), make_tuner(unet)
    with attach(unet, tuner, weight=[0.5, 0.0, 1.0]):
        together = unet(*inputs).sample
    for row, weight in enumerate((0.5, 0.0, 1.0)):
        alone = [x[row : row + 1] if x.dim() else x for x in inputs]
        with attach(unet, tuner, weight=weight):
            torch.testing.assert_close(together[row : row + 1], unet(*alone).sample, rtol=0, atol=3e-5)


@pytest.mark.parametrize(("linear", "site"), [(False, "down.0.downsample.conv"), (False, "up.1.attn.0.proj_in"),
                                              (True, "up.1.attn.0.proj_in")])  # fmt: skip
def test_a_mask_selects_positions_of_the_layers_output(inputs, linear, site):
    unet = small_unet(use_linear_projection=linear)
    place, layer = site.rsplit(".", 1)
    tuner = make_tuner(unet, sites=(place,), linears=(layer,))
    assert list(loras_of(tuner)) == [site]
    mask = torch.zeros(16, 16)
    mask[4:10, 2:8] = 1
    lora, seen = loras_of(tuner)[site], []

    def add_masked(module, args, output):
        residual = lora(args[0])
        side = 8 if "downsample" in site else 16
        small = torch.nn.functional.interpolate(mask[None, None], size=(side, side), mode="area")
        seen.append(residual.shape)
        return output + 0.5 * residual * (small if residual.dim() == 4 else small.flatten(2).transpose(1, 2))

    handle = site_module(unet, site).register_forward_hook(add_masked)
    expected = unet(*inputs).sample
    handle.remove()
    assert len(seen[0]) == (3 if linear else 4)
    with attach(unet, tuner, weight=TunerWeight(0.5, mask=mask)):
        torch.testing.assert_close(unet(*inputs).sample, expected, rtol=0, atol=1e-6)


def test_a_mask_on_a_layer_without_positions_is_refused(unet, inputs):
    tuner = make_tuner(unet, linears=("time_emb_proj",))
    # As many positions as the layer has outputs.
    inputs = (inputs[0][:, :, :4, :8], *inputs[1:])
    with (
        attach(unet, tuner, weight=TunerWeight(1.0, mask=torch.ones(8, 8))),
        pytest.raises(RestuneError, match="this site has no positions; remove the mask"),
    ):
        unet(*inputs)


def test_a_file_records_the_layers(unet, inputs, tmp_path):
    tuner = make_tuner(unet, sites=("up.*", "stem"), linears=("proj_in", "conv1", "conv_in"))
    save_tuner(tuner, tmp_path / "a.safetensors")
    info, loaded = read_info(tmp_path / "a.safetensors"), load_tuner(tmp_path / "a.safetensors")
    assert info.configs == tuner.configs
    written = {name for name, site in info.base.sites.items() if site.operation in ("proj", "conv", "ends")}
    assert written == {"stem", "up.0.resnet.0", "up.0.resnet.1", "up.0.upsample", "up.1.resnet.0", "up.1.resnet.1",
                       "up.1.attn.0", "up.1.attn.1"}  # fmt: skip
    with attach(unet, tuner):
        expected = unet(*inputs).sample
    with attach(unet, loaded):
        assert torch.equal(unet(*inputs).sample, expected)
    with pytest.raises(BaseMismatchError, match=r"site up\.1\.attn\.0 = "):
        attach(small_unet(use_linear_projection=True), loaded)


def test_frames_of_a_video_have_the_weight_of_their_image(unet):
    adapter = MotionAdapter(block_out_channels=(32, 64), motion_num_attention_heads=4, motion_norm_num_groups=8,
                            motion_layers_per_block=1, motion_mid_block_layers_per_block=1)  # fmt: skip
    motion = UNetMotionModel.from_unet2d(unet, adapter).eval()
    with pytest.raises(BaseMismatchError, match="site time = "):
        attach(motion, make_tuner(unet))
    tuner = make_tuner(unet, sites=("down.*", "mid.*", "up.*", "stem", "head"))
    latents, time, text = make_inputs()
    latents = torch.stack([latents, latents.flip(-1), -latents], dim=2)
    # As AnimateDiff's pipeline calls it.
    text = text.repeat_interleave(3, dim=0)
    with torch.no_grad(), attach(motion, tuner, weight=[1.0, 0.25]):
        together = motion(latents, time, text).sample
    for row, weight in enumerate((1.0, 0.25)):
        with torch.no_grad(), attach(motion, tuner, weight=weight):
            alone = motion(latents[row : row + 1], time, text[3 * row : 3 * row + 3]).sample
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=3e-5)
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize(("config", "modules"), [(SD15, 192), (SDXL, 722)])
def test_projections_complete_the_modules_that_kohya_trains(config, modules):
    # The numbers that its `train_network.py` and `sdxl_train_network.py` print for the U-Net.
    with torch.device("meta"):
        base = describe_base(UNet2DConditionModel(**config))
    kohya = ResConfig(self_attention="lora", cross_attention="lora", feed_forward="lora", projections="lora")
    assert len(next(Tuner.empty((kohya,), base).parts()).writes) == modules


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"projections": "lora", "grad_depth": 2}, "grad_depth counts transformer blocks"),
        ({"convolutions": "lora", "conv_alpha": 2.0}, "conv_alpha needs conv_width"),
        ({"projections": "adapter"}, "adapter is not valid; use lora"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        ResConfig(**settings)


def test_patterns_choose_among_blocks_and_groups(unet):
    base = describe_base(unet)
    with pytest.raises(RestuneError, match=r"No transformer block or group of layers matches `up\.9`; .* time, stem,"):
        Tuner.empty((OUTSIDE.model_copy(update={"sites": ("up.9",)}),), base)
    with pytest.raises(RestuneError, match="No layer matches `to_q`; this base has linear_1, linear_2, conv_in"):
        Tuner.empty((OUTSIDE.model_copy(update={"linears": ("to_q",)}),), base)
    both = ResConfig(self_attention="lora", feed_forward=None, projections="lora", linears=("to_q", "proj_in"))
    assert set(next(Tuner.empty((both,), base).parts()).writes) == {
        f"{place}.{layer}"
        for place in ("down.0.attn.0", "mid.attn.0", "up.1.attn.0", "up.1.attn.1")
        for layer in ("block.0.self.to_q", "proj_in")
    }
