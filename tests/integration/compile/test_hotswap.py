"""One tuner in the place of another, and memory that comes back."""

import gc
import weakref

import pytest
import torch

from restune_diffusion import (
    BaseMismatchError,
    BypassConfig,
    ControlConfig,
    RestuneError,
    SkipConfig,
    Tuner,
    TunerFileError,
    TunerManager,
    TunerNameError,
    attach,
    load_tuner,
    save_tuner,
)

from ...conftest import make_unet, randomize
from ...unit.hooks.test_attachment import assert_same, everything, run, trained
from ...unit.pipelines.test_loaders import generate, same


@pytest.fixture
def more(files, components, tmp_path):
    """Folder with a second tuner of the same config as `water` of the common files."""
    tuner = Tuner.for_base(components["unet"], SkipConfig(ratio=0.5))
    randomize(tuner, seed=11, std=0.05)
    save_tuner(tuner, tmp_path / "wave.safetensors", metadata={"author": "somebody"})
    save_tuner(tuner.half(), tmp_path / "half.safetensors")
    return tmp_path


def test_a_swapped_tuner_is_the_loaded_one_in_the_same_memory(pipe, files, more):
    pipe.load_tuner_weights(more / "wave.safetensors")
    wave = generate(pipe)
    pipe.unload_tuner_weights()
    pipe.load_tuner_weights(files / "water.safetensors", "style")
    water, manager = generate(pipe), TunerManager.of(pipe.unet)
    tuner, hooks = manager.tuner("style"), everything(pipe.unet)[0]
    pointers = [parameter.data_ptr() for parameter in tuner.parameters()]

    pipe.load_tuner_weights(more / "wave.safetensors", tuner_name="style", hotswap=True)
    assert TunerManager.of(pipe.unet) is manager
    assert manager.tuner("style") is tuner
    assert pointers == [parameter.data_ptr() for parameter in tuner.parameters()]
    assert everything(pipe.unet)[0] == hooks
    assert same(generate(pipe), wave)
    assert not same(wave, water)
    saved = pipe.save_tuner_weights(more / "out", "style")
    assert load_tuner(saved).metadata["author"] == "somebody"

    # The file that the first tuner came from is as it was.
    pipe.load_tuner_weights(files / "water.safetensors", "style", hotswap=True)
    assert same(generate(pipe), water)


def test_a_swap_keeps_the_weight_unless_another_is_given(pipe, files, more):
    pipe.load_tuner_weights(files / "water.safetensors", "style", weight=0.25)
    pipe.load_tuner_weights(files / "ink.safetensors", weight=0.5)
    pipe.load_tuner_weights(more / "wave.safetensors", "style", hotswap=True)
    assert pipe.get_list_tuners() == {"style": 0.25, "ink": 0.5}
    pipe.load_tuner_weights(more / "wave.safetensors", "style", weight=[1.0, 0.5], hotswap=True)
    assert pipe.get_list_tuners() == {"style": (1.0, 0.5), "ink": 0.5}


def test_a_swap_casts_to_the_dtype_of_the_loaded_tuner(pipe, files, more):
    pipe.load_tuner_weights(files / "water.safetensors", "style")
    pipe.load_tuner_weights(more / "half.safetensors", "style", hotswap=True)
    tuner, half = TunerManager.of(pipe.unet).tuner("style"), load_tuner(more / "half.safetensors")
    assert tuner.dtype == torch.float32
    assert half.dtype == torch.float16
    for mine, other in zip(tuner.parameters(), half.parameters(), strict=True):
        assert torch.equal(mine, other.float())


def test_a_swap_that_fails_changes_nothing(pipe, files, more):
    source = files / "water.safetensors"
    with pytest.raises(TunerNameError, match="No tuner named 'style' is loaded; loaded: none"):
        pipe.load_tuner_weights(source, "style", hotswap=True)
    pipe.load_tuner_weights(source, "style", weight=0.5)
    before, image = everything(pipe.unet), generate(pipe)
    with pytest.raises(TunerNameError, match="No tuner named 'water' is loaded; loaded: style"):
        pipe.load_tuner_weights(source, hotswap=True)
    with pytest.raises(RestuneError, match=r"`skip` part has ratio = 0\.5, the new one's ratio = 0\.25; only a tuner"):
        pipe.load_tuner_weights(files / "ink.safetensors", "style", hotswap=True)
    with pytest.raises(RestuneError, match=r"has the parts \['skip'\], the new one \['bypass'\]"):
        pipe.load_tuner_weights(files / "watercolor.safetensors", "style", hotswap=True)
    with pytest.raises(RestuneError, match="finite"):
        pipe.load_tuner_weights(more / "wave.safetensors", "style", weight=float("nan"), hotswap=True)
    with pytest.raises(RestuneError, match=r"No site of the tuner matches `up\.\*`"):
        pipe.load_tuner_weights(more / "wave.safetensors", "style", weight={"up.*": 1.0}, hotswap=True)
    other = trained(make_unet(), SkipConfig(ratio=0.5))
    with pytest.raises(BaseMismatchError, match="block_out_channels"):
        pipe.load_tuner_weights(other, "style", hotswap=True)
    (more / "wave.safetensors").write_bytes((more / "wave.safetensors").read_bytes()[:-100])
    with pytest.raises(TunerFileError, match="truncated"):
        pipe.load_tuner_weights(more / "wave.safetensors", "style", hotswap=True)
    assert_same(before, everything(pipe.unet))
    assert pipe.get_list_tuners() == {"style": 0.5}
    assert same(generate(pipe), image)


def test_a_swap_copies_and_keeps_no_hold_of_the_other(unet, inputs):
    one, two = trained(unet, SkipConfig(), 1), trained(unet, SkipConfig(), 2)
    attach(unet, one)
    TunerManager.of(unet).swap("default", two)
    after, alive = run(unet, inputs), weakref.ref(two)
    randomize(two, seed=3)
    assert torch.equal(run(unet, inputs), after)
    del two
    gc.collect()
    assert alive() is None


def controlled(unet, seed):
    return trained(unet, ControlConfig(), seed, std=0.2)


def test_a_swapped_control_tuner_encodes_its_images_anew(unet, inputs):
    image, outputs = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)), []
    for seed in (1, 2):
        with attach(unet, controlled(unet, seed)):
            TunerManager.of(unet).set_conditions("default", [image])
            outputs.append(run(unet, inputs))
    attach(unet, controlled(unet, 1))
    manager = TunerManager.of(unet)
    manager.set_conditions("default", [image])
    assert torch.equal(run(unet, inputs), outputs[0])
    manager.swap("default", controlled(unet, 2))
    assert torch.equal(run(unet, inputs), outputs[1])
    assert not torch.equal(outputs[0], outputs[1])


def test_conditions_follow_the_size_of_the_latents(unet, inputs):
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    half = (inputs[0][..., ::2, ::2].contiguous(), *inputs[1:])
    attach(unet, controlled(unet, 1))
    manager = TunerManager.of(unet)
    manager.set_conditions("default", [image])
    fresh = run(unet, half)
    manager.set_conditions("default", [image])
    run(unet, inputs)
    assert torch.equal(run(unet, half), fresh)
    manager.encode_conditions((16, 16))
    calls = []
    encoder = next(manager.tuner("default").parts()).encoders[0]
    encoder.register_forward_hook(lambda *_: calls.append(1))
    run(unet, inputs)
    assert not calls


def test_a_first_tuner_that_is_refused_leaves_no_hooks(unet):
    before = everything(unet)
    with pytest.raises(RestuneError, match="finite"):
        attach(unet, trained(unet, SkipConfig()), weight=float("nan"))
    assert_same(before, everything(unet))


def test_where_a_weight_lives_follows_the_tuner(unet):
    tuner = trained(unet, SkipConfig()).to("meta")
    attach(unet, tuner)
    dial = TunerManager.of(unet)._tuners["default"].weight_buffers
    assert {tensor.device.type for tensor in (dial.values, dial.count, dial.sites, dial.curve)} == {"meta"}


def test_tuners_that_act_are_moved_before_a_graph_needs_them(unet):
    for name, weight in (("on", 0.5), ("off", 0.0)):
        attach(unet, trained(unet, SkipConfig()), name, weight)
    manager, meta = TunerManager.of(unet), torch.device("meta")

    def devices():
        return [(a.tuner.device.type, a.weight_buffers.values.device.type) for a in manager._tuners.values()]

    manager.place(meta)
    assert devices() == [("meta", "meta"), ("cpu", "cpu")]
    manager.static = True
    manager.place(meta)
    assert devices() == [("meta", "meta")] * 2


@pytest.mark.parametrize("name", ["water", "watercolor"])
def test_a_deleted_tuner_returns_its_memory_and_loads_again(pipe, files, name):
    def live():
        gc.collect()
        # By type: to ask an object for its class may run code of its own.
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    before, plain = everything(pipe.unet), generate(pipe)
    tensors = live()
    pipe.load_tuner_weights(files / f"{name}.safetensors")
    # A copy, as the array holds the tensor that it was made from.
    tuned = generate(pipe, tuners=[name]).copy()
    manager = TunerManager.of(pipe.unet)
    gone = [weakref.ref(thing) for thing in (manager, manager.tuner(name), *manager.tuner(name).parameters())]
    del manager
    pipe.delete_tuners(name)
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)
    assert live() <= tensors
    assert_same(before, everything(pipe.unet))
    assert same(generate(pipe), plain)
    for _ in range(2):
        pipe.load_tuner_weights(files / f"{name}.safetensors")
        assert same(generate(pipe), tuned)
        pipe.delete_tuners(name)
        assert same(generate(pipe), plain)


def test_deleting_one_of_two_frees_it_alone(pipe, files):
    pipe.load_tuner_weights(files / "water.safetensors")
    alone = generate(pipe)
    pipe.load_tuner_weights(files / "watercolor.safetensors")
    generate(pipe)
    manager = TunerManager.of(pipe.unet)
    gone = [weakref.ref(parameter) for parameter in manager.tuner("watercolor").parameters()]
    pipe.delete_tuners("watercolor")
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)
    assert same(generate(pipe), alone)


def test_a_swap_is_of_one_config_whatever_its_parts(unet, inputs):
    configs = (SkipConfig(ratio=0.25), BypassConfig(ratio=0.25))
    one, two = (Tuner.for_base(unet, *configs) for _ in range(2))
    randomize(one, 1)
    randomize(two, 2)
    with attach(unet, two):
        expected = run(unet, inputs)
    with attach(unet, one):
        TunerManager.of(unet).swap("default", two)
        assert torch.equal(run(unet, inputs), expected)
