"""What the host does in a forward pass: look-ups happen when the mix changes, tensors are kept from pass to pass."""

import ast
import copy
import inspect
import sys
from collections import Counter

import pytest
import torch
from pydantic import BaseModel

from restune_diffusion import (
    ControlConfig,
    ResConfig,
    SkipConfig,
    TunerManager,
    TunerWeight,
    attach,
    schedule,
)
from restune_diffusion.hooks import manager as manager_module
from restune_diffusion.hooks.conditions import Conditions
from restune_diffusion.hooks.mixing import HostTimesteps, Layout

from ...conftest import make_inputs, make_unet
from .test_attachment import run, trained

LORA = ResConfig(self_attention="lora", cross_attention="lora", feed_forward=None, width=2)
MASK = torch.zeros(4, 4)
MASK[:2] = 1


def calls_of(forward):
    """Return the number of calls of each Python function in a forward pass."""
    counts = Counter()

    def profile(frame, event, argument):
        if event == "call":
            counts[frame.f_code.co_qualname] += 1

    sys.setprofile(profile)
    try:
        forward()
    finally:
        sys.setprofile(None)
    return counts


def test_the_work_at_a_site_is_small_and_looks_nothing_up(unet, inputs):
    plain = sum(calls_of(lambda: run(unet, inputs)).values())
    tuner = trained(unet, LORA)
    sites = len(next(tuner.parts()).writes)
    with attach(unet, tuner):
        run(unet, inputs)
        counts = calls_of(lambda: run(unet, inputs))
    assert sites == 128

    # Torch's own calls for three modules and their submodules are about 20 of them.
    assert (sum(counts.values()) - plain) / sites < 45
    assert counts["Module.parameters"] <= 2
    assert counts["Module.children"] == counts["Tuner.parts"] == 0


def test_a_mix_is_resolved_once(unet, inputs, monkeypatch):
    resolved = []
    original = manager_module.SiteWriters

    def counted(tuners):
        resolved.append(1)
        return original(tuners)

    monkeypatch.setattr(manager_module, "SiteWriters", counted)
    attach(unet, trained(unet, SkipConfig(), 1), "a")
    attach(unet, trained(unet, SkipConfig(), 2), "b", schedule("0-0.5: 1"))
    manager = TunerManager.of(unet)
    early, late = (inputs[0], torch.tensor(900), inputs[2]), (inputs[0], torch.tensor(100), inputs[2])
    resolved.clear()
    with torch.no_grad():
        outputs = [run(unet, step) for step in (early, early, late, late, early)]
    # The schedule switches the second tuner off and on again.
    assert len(resolved) == 2
    assert torch.equal(outputs[0], outputs[4])
    manager.set_weights({"a": 1.0})
    assert torch.equal(run(unet, late), outputs[2])


@pytest.mark.parametrize("weight", [(1.0, 0.5), TunerWeight(1.0, on="cond"), TunerWeight((1.0, 0.5), mask=MASK)])
def test_rows_and_masks_are_kept_while_nothing_changes(unet, inputs, weight):
    attach(unet, trained(unet, SkipConfig()), weight=weight)
    manager = TunerManager.of(unet)
    attached = manager._tuners["default"]
    rows = 2 if isinstance(weight, tuple) or weight.on == "both" else 1
    manager.layout = Layout(rows, True)
    first = run(unet, inputs)
    kept = attached._rows, dict(attached._masks)
    assert torch.equal(run(unet, inputs), first)
    assert attached._rows is kept[0]
    assert attached._masks.keys() == kept[1].keys()
    assert all(attached._masks[key] is mask for key, mask in kept[1].items())
    manager.set_weights({"default": 0.0})
    manager.set_weights({"default": weight})
    assert torch.equal(run(unet, inputs), first)


def test_a_mask_follows_the_size_and_the_layout(unet):
    weight = TunerWeight((1.0, 0.5), mask=torch.stack([MASK, 1 - MASK]))
    attach(unet, trained(unet, SkipConfig()), weight=weight)
    manager = TunerManager.of(unet)

    def alone(inputs, layout):
        twin = make_unet()
        with attach(twin, trained(twin, SkipConfig()), weight=weight):
            TunerManager.of(twin).layout = layout
            return run(twin, inputs)

    for size, batch in ((16, 2), (8, 2), (16, 4), (16, 2)):
        inputs, manager.layout = make_inputs(batch, size), Layout(2, batch == 4)
        assert torch.equal(run(unet, inputs), alone(inputs, manager.layout))


def test_tensors_made_in_inference_mode_serve_training_too(unet, inputs):
    tuner = trained(unet, SkipConfig())
    attach(unet, tuner, weight=TunerWeight((1.0, 0.5), mask=MASK))
    with torch.inference_mode():
        run(unet, inputs)
    tuner.requires_grad_(True)
    unet(*inputs).sample.square().mean().backward()
    assert all(parameter.grad is not None for parameter in tuner.parameters())


def test_features_of_new_images_are_in_the_same_memory(unet, inputs):
    attach(unet, trained(unet, ControlConfig(), std=0.2))
    manager = TunerManager.of(unet)
    attached = manager._tuners["default"]
    images = [torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]

    def output(image):
        manager.set_conditions("default", [image])
        manager.encode_conditions((16, 16))
        pointers = [level.data_ptr() for level in attached.conditions.encoded[0].values()]
        return run(unet, inputs), pointers

    one, two = output(images[0]), output(images[1])
    assert one[1] == two[1]
    assert not torch.equal(one[0], two[0])
    assert torch.equal(output(images[0])[0], one[0])
    # Images from before, as a pipeline puts them back after a call, do not take the features of others.
    manager.set_conditions("default", [images[0]])
    manager.encode_conditions((16, 16))
    with manager.conditions_kept():
        assert torch.equal(output(images[1])[0], two[0])
    assert isinstance(attached.conditions, Conditions)
    assert torch.equal(run(unet, inputs), one[0])


class _Scheduler:
    timesteps = torch.tensor([900, 600, 300])


def test_a_timestep_is_found_in_the_scheduler_s_list():
    known = HostTimesteps(_Scheduler())
    assert [known.read(timestep).tolist() for timestep in _Scheduler.timesteps] == [900, 600, 300]
    assert known.read(_Scheduler.timesteps[1:][0].expand(4)).tolist() == 600
    assert known.read(torch.tensor(600)) is None
    assert known.read(_Scheduler.timesteps[:2]) is None
    _Scheduler.timesteps = torch.tensor([50])
    assert known.read(_Scheduler.timesteps[0]).tolist() == 50


def test_what_a_graph_traces_suits_dynamo_of_torch_2_11(unet):
    # It cannot trace the truth of a list, and the fields of a pydantic model.
    calls = [
        node.func for node in ast.walk(ast.parse(inspect.getsource(manager_module))) if isinstance(node, ast.Call)
    ]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "bool"]
    attach(unet, trained(unet, SkipConfig()))
    attached = TunerManager.of(unet)._tuners["default"]
    held = [
        item for value in vars(attached).values() for item in (value.values() if isinstance(value, dict) else [value])
    ]
    assert not [item for item in held if isinstance(item, BaseModel)]


def test_a_copy_of_a_base_moves_its_own_weights(unet):
    tuner = trained(unet, SkipConfig())
    attach(unet, tuner)
    twin = copy.deepcopy(unet)
    twin_tuner = TunerManager.of(twin).tuner("default")
    twin_tuner.to("meta")
    buffers = [TunerManager.of(base)._tuners["default"].weight_buffers for base in (unet, twin)]
    assert [each.values.device.type for each in buffers] == ["cpu", "meta"]
    # A copy of the tuner alone has nothing to move.
    tuner.copy().to("meta")
    assert buffers[0].values.device.type == "cpu"
