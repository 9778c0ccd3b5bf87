import copy
import gc
import pickle
import weakref

import pytest
import torch

from restune_diffusion import (
    BaseMismatchError,
    BypassConfig,
    ResConfig,
    RestuneError,
    SkipConfig,
    Tuner,
    TunerManager,
    TunerNameError,
    attach,
    detach,
)

from ...conftest import make_inputs, make_unet, randomize

RES = ResConfig(
    self_attention="prefix", cross_attention="prompt", feed_forward="lora", block="adapter", gate="exact", width=4
)
KINDS = pytest.mark.parametrize(
    "config", [SkipConfig(ratio=0.5), BypassConfig(ratio=0.25), RES], ids=["skip", "bypass", "res"]
)


def trained(unet, config, seed=0, std=0.1):
    tuner = Tuner.for_base(unet, config)
    randomize(tuner, seed, std)
    return tuner


def run(unet, inputs):
    with torch.no_grad():
        return unet(*inputs).sample


def everything(unet):
    """All that Python can see of a model, deep: attributes and hooks of every module, and the state dict."""
    attributes = {
        (name, key): value if isinstance(value, int | float | str | bool | type(None)) else repr(value)
        for name, module in unet.named_modules()
        for key, value in module.__dict__.items()
    }
    return attributes, {key: value.clone() for key, value in unet.state_dict().items()}


def assert_same(before, after):
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    assert all(torch.equal(before[1][key], after[1][key]) for key in before[1])


@KINDS
def test_a_fresh_tuner_leaves_the_output_as_it_is(unet, inputs, config):
    plain = run(unet, inputs)
    with attach(unet, Tuner.for_base(unet, config)):
        assert torch.equal(run(unet, inputs), plain)


@KINDS
def test_detaching_restores_everything(unet, inputs, config):
    before, plain, pickled = everything(unet), run(unet, inputs), pickle.dumps(unet)
    attachment = attach(unet, trained(unet, config))
    assert not torch.equal(run(unet, inputs), plain)
    assert unet.state_dict().keys() == before[1].keys()
    attachment.detach()
    assert_same(before, everything(unet))
    assert torch.equal(run(unet, inputs), plain)
    assert torch.equal(run(copy.deepcopy(unet), inputs), plain)
    assert len(pickle.dumps(unet)) == len(pickled)
    assert torch.equal(run(pickle.loads(pickle.dumps(unet)), inputs), plain)
    assert TunerManager.of(unet) is None


@KINDS
def test_an_error_in_the_block_detaches_too(unet, inputs, config):
    before = everything(unet)
    with pytest.raises(RuntimeError), attach(unet, trained(unet, config)):
        run(unet, (inputs[0], inputs[1], torch.randn(2, 7, 31)))
    assert_same(before, everything(unet))


@KINDS
def test_a_copy_of_an_attached_model_has_its_own_tuner(unet, inputs, config):
    plain = run(unet, inputs)
    tuner = trained(unet, config)
    with attach(unet, tuner, "style"):
        tuned = run(unet, inputs)
        twin = copy.deepcopy(unet)
        randomize(tuner, seed=9)
        assert torch.equal(run(twin, inputs), tuned)
        detach(twin, "style")
        assert torch.equal(run(twin, inputs), plain)
        assert not torch.equal(run(unet, inputs), plain)


@pytest.mark.parametrize("first", ["a", "ab"])
def test_two_tuners_come_off_in_either_order(unet, inputs, first):
    before, plain = everything(unet), run(unet, inputs)
    tuners = {"a": trained(unet, SkipConfig(), 1), "ab": trained(unet, BypassConfig(), 2)}
    alone = {}
    for name, tuner in tuners.items():
        with attach(unet, tuner, name):
            alone[name] = run(unet, inputs)
    for name, tuner in tuners.items():
        attach(unet, tuner, name)
    last = {"a": "ab", "ab": "a"}[first]
    detach(unet, first)
    assert torch.equal(run(unet, inputs), alone[last])
    detach(unet, last)
    assert torch.equal(run(unet, inputs), plain)
    assert_same(before, everything(unet))


def test_residuals_add_up_whatever_the_order(unet, inputs):
    one, two = trained(unet, SkipConfig(), 1), trained(unet, SkipConfig(ratio=0.5), 2)
    outputs = []
    for order in ((one, two), (two, one)):
        for name, tuner in zip("ab", order, strict=True):
            attach(unet, tuner, name, 0.5)
        outputs.append(run(unet, inputs))
        detach(unet, "a")
        detach(unet, "b")
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-5)

    # by hand: rewrite the skips that each up block takes
    parts = [next(tuner.parts()) for tuner in (one, two)]

    def hook_for(first):
        def rewrite(module, args, kwargs):
            skips = kwargs["res_hidden_states_tuple"]
            tuned = tuple(
                skip + sum(0.5 * part.at_site[f"skip.{first + offset}"](skip) for part in parts)
                for offset, skip in enumerate(skips)
            )
            return args, {**kwargs, "res_hidden_states_tuple": tuned}

        return rewrite

    handles = [
        block.register_forward_pre_hook(hook_for(9 - 3 * number), with_kwargs=True)
        for number, block in enumerate(unet.up_blocks)
    ]
    torch.testing.assert_close(run(unet, inputs), outputs[0], rtol=0, atol=1e-5)
    for handle in handles:
        handle.remove()


@KINDS
def test_weight_zero_is_as_if_absent_and_is_never_run(unet, inputs, config):
    one, two = trained(unet, config, 1), trained(unet, config, 2)
    with attach(unet, one, "one"):
        alone = run(unet, inputs)
        calls = []
        two.get_submodule(config.part).register_forward_hook(lambda *_: calls.append(1))
        with attach(unet, two, "two", weight=0.0):
            assert torch.equal(run(unet, inputs), alone)
            assert not calls
            TunerManager.of(unet).set_weights({"two": 1.0})
            assert not torch.equal(run(unet, inputs), alone)
            assert calls


@KINDS
def test_the_weight_scales_the_residual(unet, inputs, config):
    tuner = trained(unet, config, std=0.02)
    residuals = []

    def keep(module, args, out):
        residuals.append(out)

    unet.up_blocks[-1].register_forward_hook(keep)
    unet.conv_norm_out.register_forward_pre_hook(lambda m, args: residuals.append(args[0]))
    outputs = {}
    with attach(unet, tuner):
        manager = TunerManager.of(unet)
        for weight in (0.0, 1.0, 2.0, -1.0):
            manager.set_weights({"default": weight})
            outputs[weight] = run(unet, inputs)
    assert not torch.equal(outputs[2.0], outputs[1.0])
    if config.part == "bypass":  # linear up to the input of the head
        plain, one, two, minus = (residuals[2 * i + 1].double() for i in range(4))
        torch.testing.assert_close(two - plain, 2 * (one - plain), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(minus - plain, plain - one, rtol=1e-4, atol=1e-5)


def test_changing_weights_touches_no_parameter(unet):
    tuners = {name: trained(unet, SkipConfig(), seed) for seed, name in enumerate(("a", "b"))}
    for name, tuner in tuners.items():
        attach(unet, tuner, name)
    manager = TunerManager.of(unet)
    pointers = [parameter.data_ptr() for tuner in tuners.values() for parameter in tuner.parameters()]
    versions = [parameter._version for tuner in tuners.values() for parameter in tuner.parameters()]
    hooks = [tuple(module._forward_pre_hooks) for module in unet.modules()]
    dials = {name: dict(vars(manager._tuners[name].weight_buffers)) for name in tuners}
    manager.set_weights({"b": 0.3})
    assert manager.weights == {"a": 0.0, "b": 0.3}
    assert pointers == [parameter.data_ptr() for tuner in tuners.values() for parameter in tuner.parameters()]
    assert versions == [parameter._version for tuner in tuners.values() for parameter in tuner.parameters()]
    assert hooks == [tuple(module._forward_pre_hooks) for module in unet.modules()]
    for name, dial in dials.items():
        assert all(vars(manager._tuners[name].weight_buffers)[key] is tensor for key, tensor in dial.items())


def test_names_are_exact_and_errors_name_what_is_there(unet):
    tuner = Tuner.for_base(unet, SkipConfig())
    attach(unet, tuner, "dog")
    with pytest.raises(TunerNameError, match="`dog` is taken"):
        attach(unet, tuner, "dog")
    with pytest.raises(TunerNameError, match="No tuner named 'do' is loaded; loaded: dog"):
        detach(unet, "do")
    with pytest.raises(TunerNameError, match="'cat'"):
        TunerManager.of(unet).set_weights({"cat": 1.0})
    with pytest.raises(RestuneError, match="finite"):
        TunerManager.of(unet).set_weights({"dog": float("nan")})
    detach(unet, "dog")
    with pytest.raises(TunerNameError, match="loaded: none"):
        detach(unet, "dog")


def test_a_tuner_for_another_base_leaves_no_hooks(unet):
    before = everything(unet)
    other = Tuner.for_base(make_unet(block_out_channels=(32, 64, 96, 96)), SkipConfig())
    with pytest.raises(BaseMismatchError, match="block_out_channels"):
        attach(unet, other)
    assert_same(before, everything(unet))


def test_a_compiled_model_is_refused(unet):
    tuner = Tuner.for_base(unet, SkipConfig())
    with pytest.raises(RestuneError, match="attach the tuners first"):
        attach(torch.compile(unet, backend="eager"), tuner)
    unet.compile(backend="eager")
    with pytest.raises(RestuneError, match="attach the tuners first"):
        attach(unet, tuner)


@KINDS
def test_nothing_of_a_forward_pass_stays(unet, inputs, config):
    seen = []
    unet.up_blocks[-1].register_forward_hook(lambda m, a, out: seen.append(weakref.ref(out)))
    with attach(unet, trained(unet, config)):
        run(unet, inputs)
        gc.collect()
        assert seen[0]() is None
        assert not TunerManager.of(unet)._features.by_site


def test_nothing_of_a_failed_forward_pass_stays(unet, inputs):
    def fail(module, args):
        raise RuntimeError("stop here")

    unet.conv_out.register_forward_pre_hook(fail)
    with attach(unet, trained(unet, BypassConfig())):
        with pytest.raises(RuntimeError, match="stop here"):
            run(unet, inputs)
        features = TunerManager.of(unet)._features
        assert not features.by_site
        assert features.time is None
        assert features.text is None


def test_a_deleted_tuner_is_freed(unet, inputs):
    tuner = trained(unet, BypassConfig())
    alive = weakref.ref(tuner)
    attach(unet, tuner)
    run(unet, inputs)
    detach(unet)
    del tuner
    gc.collect()
    assert alive() is None


@KINDS
def test_controlnet_residuals_reach_the_tuner(unet, inputs, config):
    residuals = [
        torch.randn(2, c, 16 // s, 16 // s)
        for c, s in zip(
            [32] * 4 + [64] * 3 + [64] * 2 + [64, 96, 96], [1, 1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8], strict=True
        )
    ]
    extra = {"down_block_additional_residuals": residuals, "mid_block_additional_residual": torch.randn(2, 96, 2, 2)}
    with torch.no_grad():
        plain = unet(*inputs, **extra).sample
        with attach(unet, Tuner.for_base(unet, config)):
            assert torch.equal(unet(*inputs, **extra).sample, plain)
        tuner = trained(unet, config)
        with attach(unet, tuner):
            assert not torch.equal(unet(*inputs, **extra).sample, plain)
        assert torch.equal(unet(*inputs, **extra).sample, plain)


@KINDS
@pytest.mark.parametrize("size", [16, 24, 20])
def test_any_resolution_works(unet, config, size):
    inputs = make_inputs(size=size)
    plain = run(unet, inputs)
    with attach(unet, trained(unet, config)):
        assert run(unet, inputs).shape == plain.shape


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_tuner_in_another_dtype_casts_at_the_boundary(inputs, config, dtype):
    unet = make_unet().to(dtype)
    inputs = (inputs[0].to(dtype), inputs[1], inputs[2].to(dtype))
    plain = run(unet, inputs)
    tuner = Tuner.for_base(unet, config)
    with attach(unet, tuner):
        assert torch.equal(run(unet, inputs), plain)
        randomize(tuner)
        assert run(unet, inputs).dtype == dtype
        assert tuner.dtype == torch.float32


@KINDS
def test_gradient_checkpointing_changes_no_gradient(unet, inputs, config):
    grads = []
    for checkpointing in (False, True):
        unet.train(checkpointing)
        unet.enable_gradient_checkpointing() if checkpointing else unet.disable_gradient_checkpointing()
        tuner = trained(unet, config)
        with attach(unet, tuner):
            unet(*inputs).sample.square().mean().backward()
        grads.append([parameter.grad for parameter in tuner.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)
