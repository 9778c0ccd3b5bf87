"""A tuner that does not act costs nothing: no module of it is called, and none of the base's is called for it."""

from collections import Counter

import pytest
import torch

from restune_diffusion import (
    BypassConfig,
    ControlConfig,
    ResConfig,
    SkipConfig,
    TunerManager,
    TunerWeight,
    attach,
    schedule,
)
from restune_diffusion.hooks.mixing import Layout

from ...conftest import make_inputs, make_unet
from .test_attachment import trained

SMALL = {"block_out_channels": (8, 16, 16, 24), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2}
CONFIGS = {
    "skip": SkipConfig(ratio=0.5),
    "bypass": BypassConfig(ratio=0.5),
    "adapter": ResConfig(width=4),
    "exact": ResConfig(self_attention="prompt", cross_attention="prefix", feed_forward=None, gate="exact", width=3),
    "lora": ResConfig(self_attention="lora", cross_attention="attention", feed_forward="lora", width=2),
    "control": ControlConfig(ratio=0.5),
}
EACH = pytest.mark.parametrize("name", CONFIGS)


class Watched:
    """A small U-Net with one tuner, and the calls of every module of both."""

    def __init__(self, name):
        self.unet = make_unet(**SMALL)
        self.tuner = trained(self.unet, CONFIGS[name])
        self.of_base, self.of_tuner = Counter(), Counter()
        self.rows = {}
        for path, module in self.unet.named_modules():
            module.register_forward_hook(lambda *_, path=path: self.of_base.update([path]))
        for path, module in self.tuner.named_modules():
            module.register_forward_pre_hook(lambda _, args, path=path: self._note(path, args))
        attach(self.unet, self.tuner, name)
        self.manager = TunerManager.of(self.unet)
        if name == "control":
            self.manager.set_conditions(name, [torch.rand(1, 3, 128, 128)])
        self.name = name

    def _note(self, path, args):
        self.of_tuner.update([path])
        tensor = next((arg for arg in args if isinstance(arg, torch.Tensor)), None)
        if tensor is not None and ".encoders." not in path:
            self.rows.setdefault(path, set()).add(len(tensor))

    def run(self, weight, step=321, batch=4):
        """Run once with a weight; return the calls of the base's modules and of the tuner's."""
        self.manager.set_weights({self.name: weight})
        latents, _, text = make_inputs(batch=batch)
        for counter in (self.of_base, self.of_tuner, self.rows):
            counter.clear()
        with torch.no_grad():
            self.unet(latents, torch.tensor(step), text)
        return self.of_base.copy(), self.of_tuner.copy()


def plain_calls():
    unet, calls = make_unet(**SMALL), Counter()
    for path, module in unet.named_modules():
        module.register_forward_hook(lambda *_, path=path: calls.update([path]))
    latents, _, text = make_inputs(batch=4)
    with torch.no_grad():
        unet(latents, torch.tensor(321), text)
    return calls


@EACH
def test_nothing_runs_for_a_tuner_that_does_not_act(name):
    watched, plain = Watched(name), plain_calls()
    late = schedule("0-0.5: 0, 0.5-1: 1")
    off = {
        "zero": 0.0,
        "zero for each image": [0.0, 0.0],
        "zero in this step": late,
        "outside of the schedule": schedule("0.9-1: 1"),
        "zero in this step for some, zero for others": TunerWeight((1.0, 0.0), steps=late),
        "zero at every site": {"*": 0.0},
    }
    assert watched.run(1.0, step=900)[1]
    for what, weight in off.items():
        base, tuner = watched.run(weight, step=900)
        assert not tuner, what
        assert base == plain, what
    assert watched.run(late, step=100)[1]
    watched.manager.enabled = False
    assert watched.run(1.0) == (plain, Counter())
    watched.manager.enabled = True
    assert watched.run(1.0)[1]


@EACH
def test_a_part_sees_the_rows_that_act_and_no_others(name):
    watched = Watched(name)
    for weight, rows in (
        (1.0, 4),
        ([0.0, 1.0, 0.0, 0.5], 2),
        ([0.0, 0.5], 2),
        (TunerWeight(0.7, on="cond"), 2),
        (TunerWeight((1.0, 0.0), on="uncond"), 1),
    ):
        # Guidance has two copies of two images; without a layout a list is tiled over the batch.
        watched.manager.layout = Layout(2, True) if isinstance(weight, TunerWeight) else None
        _, calls = watched.run(weight)
        assert calls
        assert set.union(*watched.rows.values()) == {rows}, weight


@pytest.mark.parametrize(
    ("name", "pattern", "silent", "heard"),
    [
        ("skip", "skip.0-3", "skip.skip.2", "skip.skip.4"),
        ("control", "skip.0", "control.skip.0.0", "control.skip.1.0"),
        ("adapter", "up.*.ff", "res.up.3.attn.0.block.0.ff.adapter", "res.up.3.attn.0.block.0.self.adapter"),
        ("lora", "*.self.to_q", "res.mid.attn.0.block.0.self.to_q.lora", "res.mid.attn.0.block.0.self.to_k.lora"),
    ],
)
def test_a_site_of_factor_zero_is_not_computed(name, pattern, silent, heard):
    watched = Watched(name)
    before = watched.run(1.0)[1]
    assert before[silent]
    calls = watched.run({pattern: 0.0})[1]
    assert calls[silent] == 0
    assert calls[heard] == before[heard] > 0


def test_a_control_tuner_encodes_its_images_once_and_not_before_it_acts():
    watched = Watched("control")
    encoder = "control.encoders.0"
    assert watched.run(0.0)[1][encoder] == 0
    assert [watched.run(weight)[1][encoder] for weight in (1.0, 0.5, [0.0, 1.0])] == [1, 0, 0]


def test_of_several_tuners_only_those_that_act_run():
    unet = make_unet(**SMALL)
    calls = Counter()
    for seed, name in enumerate("abcd"):
        tuner = trained(unet, SkipConfig(ratio=0.25), seed)
        tuner.get_submodule("skip").register_forward_pre_hook(lambda *_, name=name: calls.update(name))
        attach(unet, tuner, name)
    manager = TunerManager.of(unet)
    manager.set_weights({"b": 1.0, "d": [0.0, 1.0]})
    latents, step, text = make_inputs(batch=2)
    with torch.no_grad():
        unet(latents, step, text)
    sites = len(manager.base_info.stations) - len([site for site in manager.base_info.stations if "skip" not in site])
    assert calls == {"b": sites, "d": sites}
