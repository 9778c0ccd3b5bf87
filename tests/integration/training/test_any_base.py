"""Properties of every tuner, for random configs of a `res` part on random U-Nets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import nn

from restune_diffusion import ResConfig, Tuner, attach, describe_base, load_tuner, save_tuner

from ...conftest import make_unet

KINDS = ("adapter", "prefix", "prompt", "lora", "attention")
SETTINGS = ("self_attention", "cross_attention", "feed_forward", "block")


@st.composite
def unets(draw: st.DrawFn) -> dict[str, Any]:
    """Generate the config of a U-Net with at least one transformer block."""
    levels = draw(st.integers(2, 3))
    text = draw(st.lists(st.booleans(), min_size=levels, max_size=levels))
    mid = draw(st.sampled_from(["UNetMidBlock2DCrossAttn", None])) if any(text) else "UNetMidBlock2DCrossAttn"
    heads = draw(st.sampled_from([1, 2, 4]))
    return {
        "down_block_types": tuple("CrossAttnDownBlock2D" if reads else "DownBlock2D" for reads in text),
        "up_block_types": tuple("CrossAttnUpBlock2D" if reads else "UpBlock2D" for reads in reversed(text)),
        "mid_block_type": mid,
        "block_out_channels": tuple(draw(st.sampled_from([8, 12, 16])) for _ in range(levels)),
        "layers_per_block": draw(st.integers(1, 2)),
        "transformer_layers_per_block": draw(st.integers(1, 2)),
        "attention_head_dim": heads,
        "cross_attention_dim": draw(st.sampled_from([6, 16])),
        "only_cross_attention": draw(st.booleans()),
        "use_linear_projection": draw(st.booleans()),
        "upcast_attention": draw(st.booleans()),
        "norm_num_groups": 4,
        "sample_size": 8,
    }


@st.composite
def configs(draw: st.DrawFn, setting: str, kind: str, blocks: list[str]) -> ResConfig:
    """Config with one type of tuner in parallel to one operation, and any compatible types for the others."""
    chosen = {name: draw(st.sampled_from([None, None, *KINDS])) for name in SETTINGS} | {setting: kind}
    if chosen["block"] == "lora":
        kept = ("block", setting)
        chosen = {name: None if value == "lora" and name not in kept else value for name, value in chosen.items()}
        if setting != "block" and kind == "lora":
            chosen["block"] = None
    shares_no_softmax = not {chosen["feed_forward"], chosen["block"]} & {"prefix", "prompt"}
    return ResConfig(
        **chosen,
        # The key of a single token is idle unless it shares a softmax with others.
        width=draw(st.integers(2 if "prefix" in chosen.values() else 1, 5)),
        alpha=draw(st.sampled_from([None, 0.5, 3.0])),
        gate=draw(st.sampled_from(["scale", "exact"] if shares_no_softmax else ["scale"])),
        scale=draw(st.sampled_from(["scalar", "channel"])),
        sites=tuple(draw(st.sampled_from([["*"], blocks[:1], blocks[-1:], [f"{blocks[0][:3]}*"]]))),
    )


def inputs(unet):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return draw(2, 4, 8, 8), torch.tensor(321), draw(2, 3, unet.config["cross_attention_dim"])


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def train(unet, tuner, batch, target) -> list[float]:
    """Return the losses of a few steps on a fixed batch."""
    optimizer, losses = torch.optim.Adam(tuner.parameters(), lr=2e-3), []
    for _ in range(4):
        loss = (unet(*batch).sample - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_tuner_starts_as_the_base_learns_reloads_and_detaches(kind, setting, tmp_path):
    # A seed for each combination: with a single seed, all combinations would test the same few U-Nets.
    @seed(KINDS.index(kind) * len(SETTINGS) + SETTINGS.index(setting))
    @settings(max_examples=3, deadline=None, database=None)
    @given(structure=unets(), data=st.data())
    def check(structure, data):
        check_all_properties(structure, data, kind, setting, tmp_path / "tuner.safetensors")

    check()


def check_all_properties(structure, data, kind, setting, path):
    unet = make_unet(**structure).double()
    blocks = [name.removesuffix(".block") for name in describe_base(unet).sites if name.endswith(".block")]
    config = data.draw(configs(setting, kind, blocks))
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    batch = inputs(unet)
    plain = unet(*batch).sample
    tuner = Tuner.for_base(unet, config, generator=torch.Generator().manual_seed(0)).double()

    with attach(unet, tuner):
        assert torch.equal(unet(*batch).sample, plain)
        losses = train(unet, tuner, batch, plain + 0.3)
        tuned = unet(*batch).sample
    assert losses[0] > losses[-1]
    assert all(parameter.grad.any() for parameter in tuner.parameters())
    assert not any(parameter.grad is not None for parameter in unet.parameters())

    save_tuner(tuner, path)
    loaded = load_tuner(path)
    assert loaded.configs == (config,)
    with attach(unet, loaded):
        assert torch.equal(unet(*batch).sample, tuned)

    assert hooks(unet) == 0
    assert torch.equal(unet(*batch).sample, plain)
    assert unet.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())
