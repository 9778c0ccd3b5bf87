"""Graphs of a U-Net with tuners on a CUDA device: nothing on the host, and inputs at fixed addresses."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensorMode

from restune_diffusion import ControlConfig, ResConfig, SkipConfig, Tuner, TunerManager, TunerWeight, attach, schedule
from restune_diffusion.backbones import describe_base
from restune_diffusion.hooks.mixing import Layout

from ...conftest import TWO_LEVELS

WIDTH = 16
# Without transformer blocks, which take most of the time for tracing.
PLAIN = {
    **TWO_LEVELS,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}
SKIP = SkipConfig(ratio=0.5)
LORA = ResConfig(self_attention="lora", cross_attention="lora", feed_forward=None, width=2)
WEIGHTS = {
    "scalar": (0.5, None),
    "by image": ((1.0, 0.5), Layout(2, False, 2)),
    "schedule": (schedule("0-0.5: 1, 0.5-1: 0.5"), None),
    "on cond": (TunerWeight(0.5, on="cond"), Layout(1, True)),
    "on uncond": (TunerWeight(0.5, on="uncond"), Layout(1, True)),
    "mask": (TunerWeight(mask=torch.ones(4, 4)), None),
}


@pytest.fixture(autouse=True)
def _fake(monkeypatch):
    """Tensors without memory or values, on a device of which only the rules exist."""
    torch._dynamo.reset()
    # A CPU build of torch cannot pin.
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield
    torch._dynamo.reset()


def make_unet(blocks=PLAIN):
    with torch.device("cuda"):
        unet = UNet2DConditionModel(**blocks, cross_attention_dim=WIDTH, sample_size=16)
    return unet.eval().requires_grad_(False)


def make_tuner(unet, config):
    with torch.device("cuda"):
        return Tuner((config,), describe_base(unet))


def graph_of(unet):
    """Return the tensors that the graph of a forward pass handles on the host, and its inputs that may move."""
    found = []

    def compiler(module, inputs):
        nodes = module.graph.nodes
        on_host = [
            node.name
            for node in nodes
            if isinstance(value := node.meta.get("val"), torch.Tensor) and value.device.type != "cuda"
        ]
        fixed = TracingContext.get().fw_metadata.static_input_indices
        moving = [tuple(value.shape) for index, value in enumerate(inputs) if index not in fixed]
        found.append((on_host, moving))
        return make_boxed_func(module.forward)

    compiled = torch.compile(unet, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)
    sample, text = torch.empty(2, 4, 16, 16, device="cuda"), torch.empty(2, 7, WIDTH, device="cuda")
    compiled(sample, torch.zeros((), device="cuda", dtype=torch.long), text, return_dict=False)
    return found


# The text is not an input of a graph without attention.
SAMPLE, TIMESTEP, TEXT = (2, 4, 16, 16), (), (2, 7, WIDTH)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_graph_is_on_the_device_alone(weight):
    unet = make_unet()
    value, layout = WEIGHTS[weight]
    attach(unet, make_tuner(unet, SKIP), weight=value)
    TunerManager.of(unet).layout = layout
    assert graph_of(unet) == [([], [SAMPLE, TIMESTEP])]


def test_a_graph_with_tuners_on_linear_layers_is_on_the_device_alone():
    unet = make_unet(TWO_LEVELS)
    attach(unet, make_tuner(unet, LORA), weight=TunerWeight(0.5, on="cond"))
    TunerManager.of(unet).layout = Layout(1, True)
    assert graph_of(unet) == [([], [SAMPLE, TIMESTEP, TEXT])]


def test_condition_features_are_at_fixed_addresses_for_all_images():
    unet = make_unet()
    attach(unet, make_tuner(unet, ControlConfig(conditions=("edges",), ratio=0.5)))
    manager = TunerManager.of(unet)
    manager.set_conditions("default", [torch.empty(1, 3, 128, 128, device="cuda")])
    manager.encode_conditions((16, 16))
    assert graph_of(unet) == [([], [SAMPLE, TIMESTEP])]
