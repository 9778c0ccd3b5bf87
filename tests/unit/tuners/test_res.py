"""The `res` part: what it puts where, how it starts, and what it refuses."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from diffusers import UNet2DConditionModel

from restune_diffusion import BaseInfo, ResConfig, RestuneError, Site, Tuner, describe_base
from restune_diffusion.backbones import site_module
from restune_diffusion.tuners import Features, Operation
from restune_diffusion.tuners.configs import parts_from_json, parts_to_json

from ...conftest import SD15, SDXL, make_unet, randomize
from .operations import frozen

SD21 = {**SD15, "attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True}
BASES = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL}
KINDS = ("adapter", "prefix", "prompt", "lora", "attention")
OPERATIONS = {"self_attention": "self", "cross_attention": "cross", "feed_forward": "ff", "block": "block"}
BLOCK = "down.1.attn.0.block.0"
LINEARS = ("to_q", "to_k", "to_v", "to_out.0")


def choose(**settings):
    return ResConfig(**{"self_attention": None, "feed_forward": None, **settings})


@cache
def base_of(name):
    with torch.device("meta"):
        return describe_base(UNet2DConditionModel(**BASES[name]))


@cache
def small_unet():
    return make_unet().double()


def make_part(config):
    tuner = Tuner.for_base(small_unet(), config, generator=torch.Generator().manual_seed(0)).double()
    return tuner, next(tuner.parts())


def operation_at(site):
    """Input and description of an operation of the small U-Net, at a site of a block or of a linear layer."""
    name, _, kind = ".".join(site.split(".")[:7]).rpartition(".")
    generator = torch.Generator().manual_seed(1)
    module = site_module(small_unet(), f"{name}.{kind}")
    x, text = (torch.randn(2, *shape, dtype=torch.float64, generator=generator) for shape in ((9, 64), (7, 32)))
    if len(site.split(".")) > 7:
        width = site_module(small_unet(), site).in_features
        return torch.randn(2, 9, width, dtype=torch.float64, generator=generator), Operation()
    if kind in ("self", "cross"):
        return x, Operation(text if kind == "cross" else None, attention=frozen(module))
    return x, Operation()


def residual(part, site):
    x, operation = operation_at(site)
    return part(site, x, Features(operation=operation))


def combinations():
    for kind in KINDS:
        for setting in OPERATIONS:
            gates = ("exact", "scale") if kind in ("prefix", "prompt") and "attention" in setting else ("scale",)
            for gate in gates:
                for scale in ("scalar", "channel") if kind != "lora" else ("scalar",):
                    yield pytest.param(setting, kind, gate, scale, id=f"{kind}-{setting}-{gate}-{scale}")


@pytest.mark.parametrize(("setting", "kind", "gate", "scale"), list(combinations()))
def test_a_fresh_tuner_adds_nothing_and_learns_everything_in_two_steps(setting, kind, gate, scale):
    config = choose(**{setting: kind}, gate=gate, scale=scale, width=4, sites=(BLOCK,))
    tuner, part = make_part(config)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    with_gradient: set[str] = set()
    for step in range(2):
        optimizer.zero_grad()
        residuals = [residual(part, site) for site in part.writes]
        if step == 0:
            assert not any(r.any() for r in residuals)
        sum((r - 1).square().mean() for r in residuals).backward()
        optimizer.step()
        with_gradient |= {name for name, p in tuner.named_parameters() if p.grad is not None and p.grad.any()}
        if step == 0:
            zero = {"adapter": ("up.weight", "up.bias"), "lora": ("up.weight",), "attention": ("to_out.weight",)}
            first = zero.get(kind, ("scale",))
            assert all(name.endswith(first) for name in with_gradient), "one zero factor, not several in series"
            assert len(with_gradient) == len(first) * len(part.writes)
    assert with_gradient == {name for name, _ in tuner.named_parameters()}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("setting", OPERATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_fits_every_operation_of_the_real_bases(kind, setting, base):
    config, info = choose(**{setting: kind}, width=8), base_of(base)
    tuner = Tuner.empty((config,), info)
    part = next(tuner.parts())
    operation = OPERATIONS[setting]
    blocks = [name for name, site in info.sites.items() if site.operation == operation]
    if kind == "lora":
        inner = ("self", "cross", "ff") if setting == "block" else (operation,)
        owners = [f"{name.rpartition('.')[0]}.{step}" for name in blocks for step in inner]
        assert set(part.writes) == {f"{owner}.{path}" for owner in owners for path in info.sites[owner].linears}
    else:
        assert list(part.writes) == blocks
    assert all(key.removeprefix("res.").startswith(part.writes) for key in tuner.state_dict())
    assert all(f".{kind}." in key for key in tuner.state_dict())
    # A file holds no more of the base than the tuner uses; what is read back must be the same tuner.
    again = Tuner.empty(parts_from_json(parts_to_json([config])), tuner.base)
    shapes, expected = ({k: v.shape for k, v in t.state_dict().items()} for t in (again, tuner))
    assert shapes == expected
    assert again.base == tuner.base


@pytest.mark.parametrize("base", BASES)
def test_parameter_counts_follow_from_the_base(base):
    info, width = base_of(base), 8
    attentions = [site for site in info.sites.values() if site.operation == "self"]
    total = sum(site.channels for site in attentions)
    context, blocks = {"sd15": 768, "sd21": 1024, "sdxl": 2048}[base], len(attentions)
    assert blocks == {"sd15": 16, "sd21": 16, "sdxl": 70}[base]

    def count(kind, setting, scale="scalar"):
        return Tuner.empty((choose(**{setting: kind}, width=width, scale=scale),), info).num_parameters()

    for setting in OPERATIONS:
        assert count("adapter", setting) == (2 * width + 1) * total + (width + 1) * blocks
        assert count("adapter", setting, "channel") == (2 * width + 2) * total + width * blocks
        assert count("prefix", setting) == 2 * width * total + blocks
    for setting in ("self_attention", "feed_forward", "block"):
        assert count("prompt", setting) == width * total + blocks
        assert count("attention", setting, "channel") == (4 * width + 1) * total
    assert count("prompt", "cross_attention") == width * context * blocks + blocks
    assert count("attention", "cross_attention") == width * (2 * total + 2 * context * blocks) + blocks
    assert count("lora", "self_attention") == width * 8 * total
    assert count("lora", "cross_attention") == width * (6 * total + 2 * context * blocks)
    assert count("lora", "feed_forward") == width * (9 * total + 5 * total)
    assert count("lora", "block") == sum(count("lora", setting) for setting in list(OPERATIONS)[:3])


def test_the_dual_adapter_has_the_papers_parameter_count():
    # Table 3 of arXiv 2310.19859: dual adapters on ViT-B/16, CIFAR-100, 0.48M with the linear head.
    linears = dict.fromkeys(LINEARS, (768, 768))
    sites = {
        f"block.{number}.{operation}": Site(channels=768, stride=1, operation=operation, heads=12, linears=linears)
        for number in range(12)
        for operation in ("self", "ff", "block")
    }
    vit = BaseInfo(denoiser="ViT", structure={}, sites=sites, time_channels=1)
    tuner = Tuner.empty((ResConfig(width=10, scale="channel"),), vit)
    head = 768 * 100 + 100
    assert round((tuner.num_parameters() + head) / 1e6, 2) == 0.48


def test_each_operation_has_a_kind_of_its_own():
    config = ResConfig(
        self_attention="prefix", cross_attention="lora", feed_forward="adapter", block="attention",
        width=4, linears=("to_[kv]",), sites=("mid*",),
    )  # fmt: skip
    tuner, part = make_part(config)
    block = "mid.attn.0.block.0"
    assert set(part.writes) == {f"{block}.{end}" for end in ("self", "cross.to_k", "cross.to_v", "ff", "block")}
    assert set(part.needs) == {f"{block}.{end}" for end in ("self", "cross", "ff", "block")}
    assert f"res.{block}.cross.to_k.lora.down.weight" in tuner.state_dict()
    assert f"res.{block}.self.prefix.key" in tuner.state_dict()
    assert tuner.state_dict()[f"res.{block}.self.prefix.key"].shape == (4, 4, 24)


def test_lora_beside_the_block_stands_with_tuners_beside_its_operations():
    config = choose(block="lora", self_attention="adapter", linears=("net.2", "to_v"), sites=(BLOCK,))
    _, part = make_part(config)
    assert set(part.writes) == {f"{BLOCK}.{end}" for end in ("self", "self.to_v", "cross.to_v", "ff.net.2")}


def test_the_part_says_what_to_do_about_an_unknown_place():
    with pytest.raises(
        RestuneError, match=r"No transformer block matches `down.3.\*`; this base has down.0.attn.0.bl"
    ):
        make_part(choose(self_attention="adapter", sites=("up.*", "down.3.*")))
    with pytest.raises(RestuneError, match=r"No layer matches `to_z`; this base has to_q, to_k, to_v, to_out\.0,"):
        make_part(choose(self_attention="lora", feed_forward="lora", linears=("to_q", "to_z")))
    with pytest.raises(RestuneError, match="patterns of a `res` part are empty"):
        make_part(choose(self_attention="lora", linears=()))
    with pytest.raises(RestuneError, match="patterns of a `res` part are empty"):
        make_part(choose(self_attention="adapter", sites=()))


@pytest.mark.parametrize("setting", ["feed_forward", "block"])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_the_exact_gate_is_refused_where_there_is_no_softmax_to_share(kind, setting):
    message = (
        f'A {kind} in parallel to {setting} does not support gate="exact".*'
        f'choose gate="scale", or another type of tuner for {setting}'
    )
    with pytest.raises(RestuneError, match=message):
        make_part(choose(**{setting: kind}, gate="exact"))


def test_an_operation_that_a_block_lacks_is_left_out():
    sites = dict(base_of("sd15").sites)
    lacking = {name: site for name, site in sites.items() if name != f"{BLOCK}.cross"}
    base = base_of("sd15").model_copy(update={"sites": lacking})
    tuner = Tuner.empty((choose(cross_attention="prefix", self_attention="adapter"),), base)
    part = next(tuner.parts())
    assert f"{BLOCK}.self" in part.writes
    assert f"{BLOCK}.cross" not in part.writes
    assert sum(site.endswith(".cross") for site in part.writes) == 15
    without = {name: site for name, site in sites.items() if site.operation != "cross"}
    base = base.model_copy(update={"sites": without})
    with pytest.raises(RestuneError, match="no transformer block with cross_attention; choose another operation"):
        Tuner.empty((choose(cross_attention="prefix"),), base)
    with pytest.raises(RestuneError, match="no transformer block"):
        Tuner.empty((choose(block="adapter"),), describe_base(make_unet(**plain_blocks())))


def plain_blocks():
    return {
        "down_block_types": ("DownBlock2D",) * 4,
        "up_block_types": ("UpBlock2D",) * 4,
        "mid_block_type": None,
    }


def test_heads_are_as_many_as_the_width_allows():
    _, part = make_part(choose(block="attention", feed_forward="attention", width=6, sites=(BLOCK,)))
    assert part._tuners[f"{BLOCK}.ff"].heads == 3
    vit = Site(channels=30, stride=1, operation="ff", heads=4)
    base = BaseInfo(denoiser="ViT", structure={}, sites={"block.0.ff": vit}, time_channels=1)
    shape = (
        Tuner.empty((choose(feed_forward="prefix", width=5),), base).state_dict()["res.block.0.ff.prefix.key"].shape
    )
    assert shape == (5, 3, 10)


def test_the_seed_decides_the_start():
    config = ResConfig(self_attention="prefix", cross_attention="prompt", feed_forward="lora", block="attention")
    first, again, other = (
        Tuner.for_base(small_unet(), config, generator=torch.Generator().manual_seed(seed)).state_dict()
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    drawn = {key for key in first if not torch.equal(first[key], other[key])}
    assert {key.rsplit(".", 1)[1] for key in first.keys() - drawn} == {"scale", "weight"}
    assert all(key.endswith(("scale", "up.weight", "to_out.weight")) for key in first.keys() - drawn)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tuner_computes_in_its_own_dtype(kind):
    tuner, part = make_part(ResConfig(self_attention=kind, cross_attention=kind, feed_forward=kind, width=4))
    randomize(tuner)
    tuner.float()
    sites = [site for site in part.writes if site.startswith(BLOCK)]
    assert all(residual(part, site).dtype == torch.float32 for site in sites)
    assert all(residual(part, site).any() for site in sites)
