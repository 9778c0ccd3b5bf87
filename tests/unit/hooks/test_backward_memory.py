"""Where training keeps activations: counted with autograd's saved-tensor hooks, module by module."""

from collections import Counter

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock

from restune_diffusion import BypassConfig, ResConfig, RestuneError, SkipConfig, Tuner, attach

from ...conftest import make_inputs, make_unet, randomize


def forward_and_count(unet, inputs):
    """Run a forward pass with gradients on.

    Returns:
        The output, the bytes kept for backward per top-level module of the U-Net (what the tuners keep is under
        "tuner"), and the storages of kept tensors that a module of the backbone made.
    """
    kept, stack = Counter(), []
    parameters = {parameter.data_ptr() for parameter in unet.parameters()}
    made, kept_storages = {}, set()

    def push(name):
        def hook(module, args):
            stack.append(name)

        return hook

    def pop(name):
        def hook(module, args, out):
            stack.pop()
            outputs = out if isinstance(out, tuple) else (out,)
            outputs = [t for o in outputs for t in (o if isinstance(o, tuple) else (o,)) if torch.is_tensor(t)]
            # held, so that no later tensor can take the same address
            made.update({t.untyped_storage().data_ptr(): t for t in outputs})

        return hook

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            kept[stack[0] if stack else "tuner"] += tensor.nbytes
            kept_storages.add(tensor.untyped_storage().data_ptr())
        return tensor

    handles = []
    for name, module in unet.named_modules():
        if name:  # registered after the tuners' hooks, which therefore run outside of the module
            handles.append(module.register_forward_pre_hook(push(name.split(".")[0])))
            handles.append(module.register_forward_hook(pop(name)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = unet(*inputs).sample
    for handle in handles:
        handle.remove()
    return out, kept, kept_storages & made.keys()


HEAD = {"conv_norm_out", "conv_act", "conv_out"}
ENCODER = {"conv_in", "time_proj", "time_embedding", "down_blocks", "mid_block"}


def test_the_count_sees_what_full_training_keeps():
    unet = make_unet().requires_grad_(True)
    _, kept, storages = forward_and_count(unet, make_inputs())
    assert {"conv_in", "down_blocks", "mid_block", "up_blocks", "time_embedding"} <= kept.keys()
    assert storages


@pytest.mark.parametrize("fresh", [True, False])
def test_bypass_keeps_no_tensor_of_the_backbone(fresh):
    unet, inputs = make_unet(), make_inputs()
    tuner = Tuner.for_base(unet, BypassConfig(ratio=0.25))
    if not fresh:
        randomize(tuner)
    with attach(unet, tuner):
        out, kept, storages = forward_and_count(unet, inputs)
    assert kept.keys() <= HEAD | {"tuner"}
    assert kept["tuner"] > 0
    # Behind the merge the gradient passes the output norm, its activation and conv_out: three maps of `out`.
    assert sum(kept[name] for name in HEAD) <= 3 * 2 * 32 * 16 * 16 * 4 + 1024
    # The head's own intermediate maps are all that a backbone module made and autograd kept.
    with attach(unet, tuner):
        made_before_head = []
        for module in (unet.conv_in, *unet.down_blocks, unet.mid_block, *unet.up_blocks):
            module.register_forward_hook(
                lambda m, a, o: made_before_head.extend(
                    t.untyped_storage().data_ptr() for t in ([o] if torch.is_tensor(o) else [o[0], *o[1]])
                )
            )
        out, _, storages = forward_and_count(unet, inputs)
    assert not storages & set(made_before_head)
    out.square().mean().backward()
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert all(parameter.grad is not None for parameter in tuner.parameters())


def test_skip_tuner_keeps_nothing_of_the_encoder():
    unet, inputs = make_unet(), make_inputs()
    tuner = Tuner.for_base(unet, SkipConfig())
    with attach(unet, tuner):
        out, kept, _ = forward_and_count(unet, inputs)
    assert not kept.keys() & ENCODER
    assert kept["up_blocks"] > 0
    out.square().mean().backward()
    assert all(parameter.grad is None for parameter in unet.parameters())
    # W_up starts at zero, so on the first step only its gradient is other than zero.
    moved = {key for key, value in tuner.named_parameters() if value.grad is not None and value.grad.any()}
    assert moved == {key for key, _ in tuner.named_parameters() if ".up." in key}


def test_bypass_keeps_a_small_fraction_of_what_the_skip_tuner_keeps():
    unet, inputs = make_unet(), make_inputs()
    totals = {}
    for config in (SkipConfig(ratio=0.25), BypassConfig(ratio=0.25)):
        with attach(unet, Tuner.for_base(unet, config)):
            totals[config.part] = sum(forward_and_count(unet, inputs)[1].values())
    assert totals["bypass"] < 0.5 * totals["skip"]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_gradients_end_at_the_last_up_blocks_that_are_asked_for(depth):
    unet, inputs = make_unet(), make_inputs()
    tuner = Tuner.for_base(unet, BypassConfig(ratio=0.25), SkipConfig(grad_depth=depth))
    # Each up block of this structure takes three skips, the last the shallowest ones.
    assert list(tuner.skip.writes) == [f"skip.{number}" for number in range(3 * depth)]
    randomize(tuner)
    reached = []
    for number, block in enumerate(unet.up_blocks):
        block.register_forward_hook(
            lambda m, a, out, number=number: reached.append(number) if out.requires_grad else None
        )
    with attach(unet, tuner):
        out = unet(*inputs).sample
    assert reached == list(range(4 - depth, 4))
    out.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in tuner.skip.parameters())


def test_all_up_blocks_are_the_whole_skip_tuner():
    unet = make_unet()
    whole = Tuner.for_base(unet, SkipConfig(), generator=torch.Generator().manual_seed(0))
    all_blocks = Tuner.for_base(unet, SkipConfig(grad_depth=4), generator=torch.Generator().manual_seed(0))
    assert whole.state_dict().keys() == all_blocks.state_dict().keys()
    assert all(torch.equal(value, all_blocks.state_dict()[key]) for key, value in whole.state_dict().items())


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_gradients_end_at_the_last_transformer_blocks_that_are_asked_for(depth):
    unet, inputs = make_unet(), make_inputs()
    tuner = Tuner.for_base(unet, ResConfig(width=4, grad_depth=depth))
    blocks = [name for name, module in unet.named_modules() if isinstance(module, BasicTransformerBlock)]
    order = [name for name in blocks if name.startswith("up_blocks")]
    randomize(tuner)
    reached = []
    for name in blocks:
        unet.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: reached.append(name) if out.requires_grad else None
        )
    with attach(unet, tuner):
        out = unet(*inputs).sample
    assert reached == order[-depth:]
    out.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in tuner.parameters())


def test_the_last_transformer_block_keeps_less_than_a_bypass():
    unet, inputs = make_unet(), make_inputs()
    totals = {}
    for config in (BypassConfig(), ResConfig(width=4, grad_depth=1, self_attention=None)):
        with attach(unet, Tuner.for_base(unet, config)):
            totals[config.part] = sum(forward_and_count(unet, inputs)[1].values())
    assert totals["res"] < totals["bypass"]


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        (SkipConfig(grad_depth=5), "This base has 4 up blocks, but grad_depth is 5"),
        (SkipConfig(grad_depth=1, sites=("skip.7",)), "None of the selected skips enters the last 1 up blocks"),
        (ResConfig(grad_depth=17), "This base has 16 transformer blocks, but grad_depth is 17"),
        (
            ResConfig(grad_depth=2, sites=("mid.*",)),
            "None of the selected transformer blocks is among the last 2, up.3",
        ),
    ],
)
def test_a_depth_that_leaves_nothing_is_refused(config, fault):
    with pytest.raises(RestuneError, match=fault):
        Tuner.for_base(make_unet(), config)


def test_blocks_of_different_depth_take_different_numbers_of_skips():
    unet = make_unet(layers_per_block=(1, 2, 1, 3))
    assert list(Tuner.for_base(unet, SkipConfig(grad_depth=2)).skip.writes) == [f"skip.{n}" for n in range(5)]
