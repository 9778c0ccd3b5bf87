"""Bases other than U-Nets: a diffusion transformer, and the vision transformer of the Res-Tuning paper."""

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from transformers import ViTConfig, ViTModel

from restune_diffusion import (
    BypassConfig,
    ControlConfig,
    ResConfig,
    RestuneError,
    SkipConfig,
    Tuner,
    attach,
    describe_base,
    load_tuner,
    save_tuner,
)
from restune_diffusion.backbones import site_module, structure_of
from restune_diffusion.training.feature_cache.tap_features import predict_from_features, record_features

from ...conftest import make_inputs, make_unet, randomize
from .test_attachment import assert_same, everything

CONFIGS = {
    "bypass": BypassConfig(),
    "adapters": ResConfig(block="adapter", width=4),
    "prefixes": ResConfig(self_attention="prefix", feed_forward="prompt", block="attention", width=4),
    "exact": ResConfig(self_attention="prompt", feed_forward="lora", gate="exact", width=4),
}


def make_vit(layers=3):
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
    )
    torch.manual_seed(0)
    return ViTModel(config, add_pooling_layer=False).eval().requires_grad_(False)


def make_pixart():
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        norm_num_groups=8,
        cross_attention_dim=32,
        sample_size=8,
        patch_size=2,
        caption_channels=16,
        use_additional_conditions=False,
    )
    # adaLN opens its gates in training; shut, they would hide what is added to attention.
    torch.nn.init.normal_(model.adaln_single.linear.weight, std=0.5)
    return model.eval().requires_grad_(False)


def vit_pixels():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def run_vit(vit):
    return vit(vit_pixels()).last_hidden_state


def run_pixart(model):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 12, generator=generator)
    text = torch.randn(2, 5, 16, generator=generator)
    mask = torch.ones(2, 5)
    mask[1, 3:] = 0
    added = {"resolution": None, "aspect_ratio": None}
    return model(
        latents,
        encoder_hidden_states=text,
        timestep=torch.tensor([10, 500]),
        added_cond_kwargs=added,
        encoder_attention_mask=mask,
    ).sample


BASES = {"vit": (make_vit, run_vit), "pixart": (make_pixart, run_pixart)}
BOTH = pytest.mark.parametrize("kind", BASES)


@BOTH
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_tuners_attach_act_learn_and_come_off(kind, config, tmp_path):
    make, run = BASES[kind]
    base = make()
    before, plain = everything(base), run(base)
    tuner = Tuner.for_base(base, config)
    with attach(base, tuner):
        assert torch.equal(run(base), plain)
        randomize(tuner)
        output = run(base)
        assert (output - plain).abs().max() > 1e-3
        output.square().mean().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in tuner.parameters())
        save_tuner(tuner, tmp_path / "tuner.safetensors")
    assert torch.equal(run(base), plain)
    assert_same(before, everything(base))
    with attach(base, load_tuner(tmp_path / "tuner.safetensors")):
        assert torch.equal(run(base), output)


@BOTH
def test_every_site_is_the_module_that_is_described(kind):
    base = BASES[kind][0]()
    info = describe_base(base)
    assert len(info.stations) == 4
    for name, site in info.sites.items():
        if site.operation is None:
            continue
        layers = {path: site_module(base, f"{name}.{path}") for path in site.linears}
        assert {p: (layer.in_features, layer.out_features) for p, layer in layers.items()} == site.linears
        module = site_module(base, name)
        count = sum(isinstance(layer, torch.nn.Linear) for layer in module.modules())
        assert site.operation == "block" or count == len(layers)


@BOTH
def test_a_cross_attention_tuner_reads_the_text_where_there_is_one(kind):
    base, run = BASES[kind][0](), BASES[kind][1]
    config = ResConfig(self_attention=None, feed_forward=None, cross_attention="prefix", gate="exact", width=4)
    if kind == "vit":
        with pytest.raises(RestuneError, match="no transformer block with cross_attention"):
            Tuner.for_base(base, config)
        return
    plain, tuner = run(base), Tuner.for_base(base, config)
    randomize(tuner)
    with attach(base, tuner):
        assert not torch.equal(run(base), plain)


@BOTH
@pytest.mark.parametrize("config", [SkipConfig(), ControlConfig()], ids=["skip", "control"])
def test_skip_tuners_are_refused_where_there_are_no_skips(kind, config):
    with pytest.raises(RestuneError, match="This base has no site for this tuner family"):
        Tuner.for_base(BASES[kind][0](), config)


def test_the_frozen_projections_of_a_vit_are_its_attention():
    vit = make_vit()
    seen = {}

    class Spy(torch.nn.Module):
        def forward(self, x, operation):
            frozen = operation.attention
            attended = torch.nn.functional.scaled_dot_product_attention(
                frozen.query(x), frozen.key(x), frozen.value(x), attn_mask=operation.mask
            )
            seen["ours"] = frozen.output(attended.transpose(1, 2).flatten(2))
            return torch.zeros_like(x)

    tuner = Tuner.for_base(vit, ResConfig(self_attention="prefix", feed_forward=None, sites=("block.1",)))
    part = next(tuner.parts())
    part._tuners["block.1.self"] = Spy()
    attention = vit.layers[1].attention
    attention.register_forward_hook(lambda m, args, output: seen.update(theirs=output[0]))
    with attach(vit, tuner):
        run_vit(vit)
    torch.testing.assert_close(seen["ours"] + attention.o_proj.bias, seen["theirs"], rtol=0, atol=1e-6)


def test_a_bypass_keeps_nothing_of_a_vit_for_backward():
    vit = make_vit()
    tuner = Tuner.for_base(vit, BypassConfig())
    randomize(tuner)
    with attach(vit, tuner):
        inside = []
        for layer in vit.layers:
            layer.register_forward_hook(lambda m, args, output: inside.append(output.requires_grad))
        assert run_vit(vit).requires_grad
    assert inside == [False] * 3


def test_one_pass_of_a_vit_serves_several_tasks_exactly():
    vit = make_vit()
    heads = {f"task{index}": torch.nn.Linear(32, 5 + index) for index in range(3)}
    tuners = {name: Tuner.for_base(vit, BypassConfig(ratio=0.25 * (index + 1))) for index, name in enumerate(heads)}
    for index, tuner in enumerate(tuners.values()):
        randomize(tuner, index)
    passes = []
    vit.layers[0].register_forward_hook(lambda m, args, output: passes.append(len(output)))
    with torch.no_grad():
        alone = {}
        for name, head in heads.items():
            with attach(vit, tuners[name]):
                alone[name] = head(run_vit(vit)[:, 0])
        passes.clear()
        features = record_features(vit, taps_of(tuners.values()), vit_pixels())
        states = {name: predict_from_features(vit, tuner, features) for name, tuner in tuners.items()}
        assert passes == [2]
        for name, head in heads.items():
            assert torch.equal(head(states[name][:, 0]), alone[name])
    assert features.size == (4, 4)
    assert features.time is None
    assert (alone["task0"] - alone["task1"][:, :5]).abs().max() > 1e-3


def test_one_pass_of_a_unet_serves_several_bypass_tuners():
    unet, inputs = make_unet(), make_inputs()
    alone, tuners = [], [Tuner.for_base(unet, BypassConfig(ratio=0.25)) for _ in range(2)]
    with torch.no_grad():
        for seed, tuner in enumerate(tuners):
            randomize(tuner, seed)
            with attach(unet, tuner):
                alone.append(unet(*inputs).sample)
        features = record_features(unet, taps_of(tuners), *inputs)
        for tuner, expected in zip(tuners, alone, strict=True):
            assert torch.equal(predict_from_features(unet, tuner, features), expected)
    assert not torch.equal(*alone)


def test_a_pass_is_shared_by_bypass_tuners_alone():
    vit, pixart = make_vit(), make_pixart()
    bypass, res = Tuner.for_base(vit, BypassConfig()), Tuner.for_base(vit, ResConfig(width=4))
    features = record_features(vit, taps_of([bypass]), vit_pixels())
    with pytest.raises(
        RestuneError,
        match=r"Only a tuner of one part that writes at `out` .* this one has res; attach",
    ):
        predict_from_features(vit, res, features)
    with pytest.raises(RestuneError, match="head of PixArtTransformer2DModel cannot run on recorded features"):
        structure_of(pixart).run_head(pixart, torch.zeros(2, 64, 32))
    with attach(vit, bypass, "mine"), pytest.raises(RestuneError, match="but these are active: mine; detach them"):
        record_features(vit, taps_of([bypass]), vit_pixels())


def taps_of(tuners):
    return {site for tuner in tuners for part in tuner.parts() for site in part.taps}
