import time
from dataclasses import asdict
from fnmatch import fnmatchcase
from itertools import product

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st

from restune_diffusion import (
    BypassConfig,
    ResConfig,
    RestuneError,
    SkipConfig,
    TextConfig,
    Tuner,
    describe_base,
    load_tuner,
    save_tuner,
)
from restune_diffusion.backbones import TextInfo
from restune_diffusion.backbones.site_names import SiteName, SitePattern, match_sites
from restune_diffusion.hooks.weights import TunerWeight
from restune_diffusion.pipelines.sampling.mix import read_sites

from ...conftest import SD15, make_unet
from ..hooks.test_transformers import make_pixart, make_vit

NAMES = ["skip.0", "skip.1", "skip.3", "skip.4", "skip.10", "mid", "up.1.attn.0.block.0.ff", "up.2.attn.2.block.0.ff"]


@pytest.mark.parametrize(
    ("pattern", "matching"),
    [
        ("skip.0-3", ["skip.0", "skip.1", "skip.3"]),
        ("skip.*", ["skip.0", "skip.1", "skip.3", "skip.4", "skip.10"]),
        ("up.1-2.*.ff", ["up.1.attn.0.block.0.ff", "up.2.attn.2.block.0.ff"]),
        ("skip.9-11", ["skip.10"]),
        ("up.1-2.attn.0-1.block.0.ff", ["up.1.attn.0.block.0.ff"]),
        ("mid", ["mid"]),
        ("*.1-2.block.*", ["up.2.attn.2.block.0.ff"]),
        ("skip.3-1", []),
        # as `fnmatch` reads them: a set of characters has no ranges of numbers in it
        ("skip.[0-3]", ["skip.0", "skip.1", "skip.3"]),
        ("skip.1[0-1]", ["skip.10"]),
        ("skip.[!0-3]", ["skip.4"]),
        ("skip.?", ["skip.0", "skip.1", "skip.3", "skip.4"]),
        ("up.1-2*", ["up.1.attn.0.block.0.ff", "up.2.attn.2.block.0.ff"]),
        ("skip.0-3\0", []),
    ],
)
def test_patterns_with_ranges(pattern, matching):
    assert SitePattern(pattern).select(NAMES) == matching
    assert [name for name in NAMES if SitePattern(pattern).matches(name)] == matching


@given(st.integers(0, 1100), st.integers(0, 1100))
def test_a_range_is_every_number_from_first_to_last(first, last):
    names = [f"skip.{number}" for number in range(1200)]
    assert SitePattern(f"skip.{first}-{last}").select(names) == names[first : last + 1]


STEPS = st.sampled_from(["up", "attn", "block", "*", "?", "[ub]*", "1", "12", "0-2", "1-12", "9-11"])


@given(
    st.lists(STEPS, min_size=1, max_size=5).map(".".join),
    st.lists(st.sampled_from(["up", "attn", "block", "0", "1", "2", "10", "12", "13"]), min_size=1, max_size=6).map(
        ".".join
    ),
)
def test_a_pattern_matches_what_one_of_its_numbers_does(pattern, name):
    choices = [
        [str(number) for number in range(int(step.split("-")[0]), int(step.split("-")[1]) + 1)]
        if "-" in step
        else [step]
        for step in pattern.split(".")
    ]
    expected = any(fnmatchcase(name, ".".join(steps)) for steps in product(*choices))
    assert SitePattern(pattern).matches(name) == expected


def test_every_place_that_takes_a_pattern_takes_a_range():
    with torch.device("meta"):
        base = describe_base(UNet2DConditionModel(**SD15))
    info = TextInfo(hidden_size=8, num_hidden_layers=2, vocab_size=9, linears={"mlp.0": (8, 8), "mlp.3": (8, 8)})
    base = base.model_copy(update={"text": {"text_encoder": info, "text_encoder_2": info}})

    def part(config):
        return next(Tuner.empty((config,), base).parts())

    assert part(SkipConfig(sites=("skip.0-2", "skip.10-99"))).writes == (
        "skip.0",
        "skip.1",
        "skip.2",
        "skip.10",
        "skip.11",
    )
    assert part(BypassConfig(taps=("skip.9-12", "up.1-2"))).taps == ("skip.9", "skip.10", "skip.11", "up.1", "up.2")
    lora = part(ResConfig(self_attention=None, feed_forward="lora", linears=("net.1-9",), sites=("down.1-9.*",)))
    assert lora.writes == tuple(
        f"down.{block}.attn.{attention}.block.0.ff.net.2" for block in (1, 2) for attention in (0, 1)
    )
    text = part(TextConfig(encoders=("text_encoder_2-3",), linears=("mlp.1-4",)))
    assert text.text_encoders == ("text_encoder_2",)
    assert text.linears("text_encoder_2") == ["layers.0.mlp.3", "layers.1.mlp.3"]
    factors = TunerWeight(sites=read_sites("skip.1-2=0.5")).site_factors(["skip.0", "skip.1", "skip.2"])
    assert factors == {"skip.0": 1.0, "skip.1": 0.5, "skip.2": 0.5}


def test_a_range_that_matches_nothing_is_named_with_what_there_is():
    with pytest.raises(RestuneError, match=r"No site matches `skip\.12-15`; this base has skip\.0, skip\.1, "):
        Tuner.for_base(make_unet(), SkipConfig(sites=("skip.12-15",)))
    with pytest.raises(RestuneError, match=r"No layer matches `net\.5-9`; this base has net\.0\.proj, net\.2\."):
        Tuner.for_base(make_unet(), ResConfig(self_attention=None, feed_forward="lora", linears=("net.5-9",)))


def test_a_file_keeps_the_pattern_as_it_was_written(tmp_path):
    unet = make_unet()
    config = SkipConfig(sites=("skip.0-3", "skip.[5-6]"))
    tuner = Tuner.for_base(unet, config)
    save_tuner(tuner, tmp_path / "some.safetensors")
    loaded = load_tuner(tmp_path / "some.safetensors")
    assert loaded.configs == (config,)
    assert next(loaded.parts()).writes == ("skip.0", "skip.1", "skip.2", "skip.3", "skip.5", "skip.6")


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("skip.11", {"family": "skip", "index": 11}),
        ("mid", {"family": "mid"}),
        ("out", {"family": "out"}),
        ("block.3", {"family": "block", "index": 3}),
        ("block.3.block", {"family": "block", "index": 3, "operation": "block"}),
        ("block.3.self.to_q", {"family": "block", "index": 3, "operation": "self", "linear": "to_q"}),
        ("mid.attn.0.block.2.ff", {"family": "mid", "attention": 0, "block": 2, "operation": "ff"}),
        (
            "down.1.attn.0.block.9.cross.to_out.0",
            {"family": "down", "index": 1, "attention": 0, "block": 9, "operation": "cross", "linear": "to_out.0"},
        ),
        ("mid.attn.0", {"family": "mid", "attention": 0, "operation": "proj"}),
        (
            "down.1.attn.0.proj_in",
            {"family": "down", "index": 1, "attention": 0, "operation": "proj", "linear": "proj_in"},
        ),
        ("up.2.resnet.1.conv1", {"family": "up", "index": 2, "resnet": 1, "operation": "conv", "linear": "conv1"}),
        (
            "down.0.downsample.conv",
            {"family": "down", "index": 0, "sampler": "downsample", "operation": "conv", "linear": "conv"},
        ),
        ("stem.conv_in", {"family": "stem", "operation": "ends", "linear": "conv_in"}),
    ],
)
def test_a_name_taken_apart(text, steps):
    absent = dict.fromkeys(("index", "attention", "block", "operation", "linear", "resnet", "sampler"))
    name = SiteName.parse(text)
    assert asdict(name) == {**absent, **steps}
    assert str(name) == text


@pytest.mark.parametrize("base", [make_unet, make_pixart, make_vit])
def test_every_site_of_every_base_has_a_name_that_can_be_read(base):
    described = describe_base(base())
    assert described.sites
    for text, site in described.sites.items():
        name = SiteName.parse(text)
        assert str(name) == text
        assert name.operation == site.operation
        assert name.operation_site == text
        for path in site.layers:
            linear = SiteName.parse(f"{text}.{path}")
            assert (linear.linear, linear.operation_site) == (path, text)
            assert f"{text}.".startswith(f"{linear.place}.")
    skips = [name for name, _ in described.sites.items() if name.partition(".")[0] == "skip"]
    assert described.skips == skips
    assert len(skips) == (12 if base is make_unet else 0)


@pytest.mark.parametrize("text", ["", "skip.", "skip.01", "skip.x", "skp.0", "skip.0.attn.1", "out\n", "down.1.conv",
                                  "down.1.attn.0.conv1", "up.1.resnet.x", "down.1.attn.0.block"])  # fmt: skip
def test_another_text_is_no_name(text):
    assert SiteName.find(text) is None
    with pytest.raises(RestuneError, match=r"is not a site name; expected for example `skip\.3`"):
        SiteName.parse(text)


def test_long_lists_of_patterns_are_read_in_time():
    names = [f"skip.{number}" for number in range(1024)]
    start = time.process_time()
    chosen = match_sites([*names, *(f"skip.0-{number}" for number in range(1024))], names)
    assert chosen == names
    assert time.process_time() - start < 10
