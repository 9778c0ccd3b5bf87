from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from restune_diffusion import RestuneError, schedule
from restune_diffusion.pipelines.sampling.mix import MixSettings


def test_each_option_reaches_its_tuner(tmp_path: Path) -> None:
    Image.new("L", (4, 4), "white").save(tmp_path / "all.png")
    options = MixSettings(
        tuner=("a/water.safetensors:0.5", "b/ink.safetensors"),
        tuner_sites=("ink: skip.0-3=0.2, up.*=0",),
        tuner_schedule=("water: 0-0.5: 0>1, 0.5-1: 1", "ink:0.3-1: 1"),
        tuner_mask=(f"ink:{tmp_path / 'all.png'}",),
        tuner_guidance=("water: cond",),
    )
    weights = options.weights()
    assert [(name, path) for name, (path, _) in weights.items()] == [
        ("water", "a/water.safetensors"),
        ("ink", "b/ink.safetensors"),
    ]
    water, ink = (weight for _, weight in weights.values())
    assert (water.value, water.on, water.sites, water.mask) == (0.5, "cond", {}, None)
    assert water.steps == schedule("0-0.5: 0>1, 0.5-1: 1")
    assert (ink.value, ink.on, ink.sites, ink.steps) == (1.0, "both", {"skip.0-3": 0.2, "up.*": 0.0},
                                                         schedule("0.3-1: 1"))  # fmt: skip
    assert ink.mask is not None
    assert ink.mask.shape == (4, 4)


def test_one_tuner_needs_no_name() -> None:
    options = MixSettings(tuner=("ink.safetensors",), tuner_sites=("mid=0.5",), tuner_schedule=("0.3-1: 1",))
    ((_, weight),) = options.weights().values()
    assert weight.sites == {"mid": 0.5}
    assert weight.steps == schedule("0.3-1: 1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tuner_sites": ("mid=1",)}, "needs a tuner"),
        ({"tuner": ("a", "b"), "tuner_sites": ("mid=1",)}, "and a colon. The tuners are a, b"),
        ({"tuner": ("a", "b"), "tuner_sites": ("oil:mid=1",)}, "and a colon. The tuners are a, b"),
        ({"tuner": ("a",), "tuner_sites": ("mid=1", "a: mid=2")}, "given twice for the tuner a"),
        ({"tuner": ("a",), "tuner_sites": ("mid",)}, "Invalid site weight `mid`"),
        ({"tuner": ("a",), "tuner_schedule": ("mid=1",)}, "Invalid schedule segment `mid=1`"),
        ({"tuner": ("a",), "tuner_guidance": ("half",)}, "`both`, `cond` or `uncond`"),
        ({"tuner": ("a",), "tuner_mask": ("gone.png",)}, "gone.png cannot be read"),
    ],
)
def test_invalid_options_are_reported(options: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(RestuneError, match=message):
        MixSettings(**options).weights()
