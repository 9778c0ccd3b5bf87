"""torch.compile with tuners attached: one graph, whatever the mix, and the eager output."""

import copy
import itertools

import pytest
import torch
from torch._dynamo.utils import counters

from restune_diffusion import (
    BypassConfig,
    ControlConfig,
    ResConfig,
    RestuneError,
    RestuneStableDiffusionPipeline,
    SkipConfig,
    Tuner,
    TunerManager,
    TunerNameError,
    TunerWeight,
    attach,
    save_tuner,
    schedule,
)
from restune_diffusion.hooks.mixing import Layout

from ...conftest import TWO_LEVELS, make_inputs, make_unet, randomize

# Tracing costs seconds for each block, so this is the smallest U-Net that has every kind of site.
SMALL = {**TWO_LEVELS, "cross_attention_dim": 16}
CONFIGS = {
    "skip": SkipConfig(ratio=0.5),
    "bypass": BypassConfig(ratio=0.5),
    "redundancy": BypassConfig(form="redundancy", ratio=0.5),
    "mixers": BypassConfig(form="mixers", mixer_rank=4),
    "adapter": ResConfig(feed_forward="adapter", width=4),
    "lora": ResConfig(self_attention="lora", cross_attention="lora", feed_forward=None, width=2),
    "layers outside": ResConfig(
        self_attention=None,
        feed_forward=None,
        projections="lora",
        convolutions="lora",
        ends="lora",
        width=2,
    ),
    "exact": ResConfig(self_attention="prompt", cross_attention="prefix", feed_forward=None, gate="exact", width=3),
    "mixed": ResConfig(
        self_attention="attention", cross_attention="prompt", feed_forward="prefix", block="attention", width=4
    ),
    "control": ControlConfig(conditions=("edges",), ratio=0.5),
}
ROWS = 4
# Each form of weight; of the rows of a batch none, some and all are of weight zero for one image or another.
WEIGHTS = [
    0.5,
    -0.25,
    {"*": 0.5},
    {"*": -1.0},
    [0.1, 0.2, 0.3, 0.4],
    [1.0, 0.0, 0.0, -1.0],
    [0.3, 0.6],
    schedule("0-0.5: 0, 0.5-1: 1"),
    schedule("0-0.2: 1, 0.2-0.6: 0>1, 0.6-1: 0.5"),
    TunerWeight((0.5, 1.0), sites={"*": 0.5}, steps=schedule("0-1: 1>0")),
    1.0,
]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def prepare(*names):
    """Attach tuners to a small U-Net and compile it."""
    unet = make_unet(**SMALL)
    for seed, name in enumerate(names):
        attach(unet, make_tuner(unet, name, seed), name)
    manager = TunerManager.of(unet)
    if "control" in names:
        manager.set_conditions("control", [torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))])
        manager.encode_conditions((16, 16))
    return unet, manager, torch.compile(unet, fullgraph=True, backend="eager")


def make_tuner(unet, name, seed):
    tuner = Tuner.for_base(unet, CONFIGS[name])
    randomize(tuner, seed, std=0.2)
    return tuner


def check(unet, compiled, step=321):
    """Compare with the eager model, and return the output."""
    latents, _, text = make_inputs(batch=ROWS, text_width=16)
    inputs = (latents, torch.tensor(step), text)
    out = compiled(*inputs).sample
    torch.testing.assert_close(out, unet(*inputs).sample, rtol=0, atol=1e-5)
    return out


def graphs():
    return counters["stats"]["unique_graphs"]


def no_recompilation():
    return torch._dynamo.config.patch(error_on_recompile=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_graph_serves_every_weight_and_swap(name):
    unet, manager, compiled = prepare(name)
    first = check(unet, compiled)
    with no_recompilation():
        outputs = [first]
        for weight in WEIGHTS:
            manager.set_weights({name: weight})
            for step in (900, 321):
                outputs.append(check(unet, compiled, step))
        assert torch.equal(outputs[-1], first)
        assert max((output - first).abs().max() for output in outputs[1::2]) > 1e-3

        manager.swap(name, make_tuner(unet, name, seed=7))
        assert (check(unet, compiled) - first).abs().max() > 1e-3
        manager.swap(name, make_tuner(unet, name, seed=0))
        assert torch.equal(check(unet, compiled), first)
    assert graphs() == 1


def test_a_static_graph_serves_tuners_that_are_off():
    names = tuple(CONFIGS)
    unet, manager, compiled = prepare(*names)
    manager.static = True
    # The first graph is made while a tuner is off.
    manager.set_weights({"skip": 1.0})
    check(unet, compiled)
    with no_recompilation():
        for name in names:
            manager.set_weights({name: 0.7})
            check(unet, compiled)
            manager.set_weights({name: [0.0, 1.0, 0.0, 0.5]})
            check(unet, compiled)
        for number, name in enumerate(names):
            manager.swap(name, make_tuner(unet, name, seed=20 + number))
        # Each image with its own tuner, the third with none.
        rows = itertools.cycle(([0.5, 0, 0, 0], [0, 0.7, 0, 0], [0, 0, 0, 1.0]))
        manager.set_weights(dict(zip(names, rows, strict=False)))
        mixed = check(unet, compiled)
        manager.set_weights({})
        plain = check(unet, compiled)
    torch.testing.assert_close(mixed[2], plain[2], rtol=0, atol=1e-5)
    assert (mixed - plain).abs().amax((1, 2, 3))[[0, 1, 3]].min() > 1e-3
    assert graphs() == 1


def test_without_static_a_tuner_that_is_off_is_not_in_the_graph():
    unet, manager, compiled = prepare("skip")
    check(unet, compiled)
    manager.set_weights({})
    calls = []
    manager.tuner("skip").get_submodule("skip").register_forward_pre_hook(lambda *_: calls.append(1))
    check(unet, compiled)
    assert not calls
    assert graphs() == 2


def test_one_half_of_guidance_and_a_mask_do_not_depend_on_the_number():
    unet, manager, compiled = prepare("skip")
    manager.layout = Layout(2, True)
    mask = torch.zeros(4, 4)
    mask[:2] = 1
    manager.set_weights({"skip": TunerWeight(0.5, mask=mask, on="cond")})
    check(unet, compiled)
    with no_recompilation():
        manager.set_weights({"skip": TunerWeight(-1.5, mask=1 - mask, on="cond")})
        out = check(unet, compiled)
    manager.set_weights({"skip": 0.0})
    torch.testing.assert_close(out[:2], check(unet, unet)[:2], rtol=0, atol=1e-5)


def test_conditions_that_are_encoded_in_a_pass_need_two_graphs_and_no_third():
    unet, manager, compiled = prepare("control")
    for seed in range(3):
        images = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(seed))
        manager.set_conditions("control", [images])
        check(unet, compiled)
        check(unet, compiled)
    assert graphs() == 2


def test_what_comes_off_a_compiled_model_is_gone():
    unet, _, compiled = prepare("skip", "adapter")
    plain = make_unet(**SMALL)
    both = check(unet, compiled)
    with pytest.raises(RestuneError, match=r"attach the tuners first, then call torch\.compile"):
        attach(unet, make_tuner(unet, "exact", 3), "exact")
    assert torch.equal(check(unet, compiled), both)
    # The hooks on skip connections and on these operations are there already.
    attach(unet, make_tuner(unet, "bypass", 4), "bypass")
    attach(unet, make_tuner(unet, "adapter", 5), "another")
    assert not torch.equal(check(unet, compiled), both)
    for name in ("bypass", "another", "skip", "adapter"):
        TunerManager.of(compiled).remove(name)
        check(unet, compiled)
    assert TunerManager.of(compiled) is None
    assert torch.equal(check(plain, compiled), check(plain, plain))


def test_blocks_that_are_compiled_alone_refuse_tuners_inside_them():
    unet = make_unet(**SMALL)
    unet.compile_repeated_blocks(backend="eager")
    with pytest.raises(RestuneError, match="attach the tuners first"):
        attach(unet, make_tuner(unet, "adapter", 0))
    assert TunerManager.of(unet) is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())
    with attach(unet, make_tuner(unet, "skip", 0)):
        assert not torch.equal(check(unet, unet), check(make_unet(**SMALL), make_unet(**SMALL)))


@pytest.fixture
def small_pipe(components):
    width = components["text_encoder"].config.hidden_size
    unet = make_unet(**{**SMALL, "cross_attention_dim": width})
    pipe = RestuneStableDiffusionPipeline(**{**components, "unet": unet}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **kwargs):
    options = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent"}
    generator = torch.Generator().manual_seed(0)
    return pipe(["a cat", "a dog"], generator=generator, **options, **kwargs).images


@pytest.mark.parametrize("in_place", [False, True], ids=["wrapped", "in place"])
def test_a_pipelines_methods_reach_a_compiled_unet(small_pipe, tmp_path, in_place):
    pipe, unet = small_pipe, small_pipe.unet
    for seed, name in enumerate("abc"):
        save_tuner(make_tuner(unet, "skip", seed), tmp_path / f"{name}.safetensors")
    twin = RestuneStableDiffusionPipeline(
        **{**pipe.components, "unet": copy.deepcopy(unet)}, requires_safety_checker=False
    )
    twin.set_progress_bar_config(disable=True)
    pipe.enable_tuner_hotswap()
    for one in (pipe, twin):
        one.load_tuner_weights(tmp_path / "a.safetensors", "style")
        one.load_tuner_weights(tmp_path / "b.safetensors", "other", weight=0.0)
    if in_place:
        pipe.unet.compile(fullgraph=True, backend="eager")
    else:
        pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend="eager")

    def agree(**kwargs):
        torch.testing.assert_close(draw(pipe, **kwargs), draw(twin, **kwargs), rtol=0, atol=1e-4)

    agree()
    with no_recompilation():
        for one in (pipe, twin):
            one.load_tuner_weights(tmp_path / "c.safetensors", "style", hotswap=True)
        agree()
        agree(tuners=["other", None])
        for one in (pipe, twin):
            one.set_tuners(["style", "other"], [0.5, -0.5])
        agree()
    assert pipe.get_list_tuners() == {"style": 0.5, "other": -0.5}
    assert pipe.get_active_tuners() == ["style", "other"]
    assert graphs() == 1
    for one in (pipe, twin):
        one.delete_tuners("other")
    agree()
    for one in (pipe, twin):
        one.unload_tuner_weights()
    agree()
    assert TunerManager.of(unet) is None
    with pytest.raises(RestuneError, match="already compiled"):
        pipe.load_tuner_weights(tmp_path / "a.safetensors")
    with pytest.raises(TunerNameError, match="loaded: none"):
        pipe.load_tuner_weights(tmp_path / "a.safetensors", hotswap=True)


def test_enabling_hotswap_comes_before_compiling(small_pipe):
    small_pipe.enable_tuner_hotswap()
    small_pipe.load_tuner_weights(Tuner.for_base(small_pipe.unet, SkipConfig()), "style")
    assert TunerManager.of(small_pipe.unet).static
    small_pipe.unet = torch.compile(small_pipe.unet, backend="eager")
    with pytest.raises(RestuneError, match=r"before torch\.compile"):
        small_pipe.enable_tuner_hotswap()
    with pytest.warns(UserWarning, match=r"before torch\.compile"):
        small_pipe.enable_tuner_hotswap(check_compiled="warn")
    small_pipe.enable_tuner_hotswap(check_compiled="ignore")
    with pytest.raises(RestuneError, match="`error`, `warn` or `ignore`"):
        small_pipe.enable_tuner_hotswap(check_compiled="never")


def test_a_compiled_unet_learns_no_wrong_number_of_images(small_pipe):
    small_pipe.load_tuner_weights(Tuner.for_base(small_pipe.unet, SkipConfig()), "style")
    small_pipe.set_tuners({"style": [1.0, 0.5, 0.0, 1.0]})
    small_pipe.unet = torch.compile(small_pipe.unet, backend="eager")
    with pytest.raises(RestuneError, match="for 4 images, but 2 are generated"):
        draw(small_pipe)
