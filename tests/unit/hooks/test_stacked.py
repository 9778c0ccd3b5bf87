from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.many_tuners import Kernels
from restune_diffusion import ResConfig, SkipConfig, Tuner, TunerWeight, attach, describe_base
from restune_diffusion.hooks.manager import TunerManager
from restune_diffusion.hooks.mixing import Layout
from restune_diffusion.hooks.site_writers import SiteWriters

from ...conftest import make_inputs, make_unet, randomize

KINDS = {
    "skip": (SkipConfig(ratio=0.25), SkipConfig(ratio=0.5)),
    "adapter": (
        ResConfig(self_attention="adapter", cross_attention=None, feed_forward=None, width=4),
        ResConfig(self_attention="adapter", cross_attention=None, feed_forward=None, width=6, scale="channel"),
    ),
    "lora": (
        ResConfig(self_attention="lora", cross_attention="lora", feed_forward=None, width=4),
        ResConfig(self_attention="lora", cross_attention="lora", feed_forward=None, width=2, alpha=5.0),
    ),
}
MIXES: dict[str, dict[str, Any]] = {
    "all rows": {"a": 0.5, "b": 2.0, "c": -1.0},
    "one each": {"a": [1, 0, 0, 0], "b": [0, 0.5, 0, 0], "c": [0, 0, 2, 0]},
    "ragged": {"a": [1, 0, 0.5, 0], "b": [0.5, 0, 1, 0], "c": [2, 1, 1, 0]},
    "rows and all": {"a": [1, 0, 0, 2], "b": 0.7, "c": 0.0},
}


def attached(unet: Any, kind: str, mix: dict[str, Any]) -> TunerManager:
    """Attach three tuners, the third of another width."""
    base = describe_base(unet)
    for seed, (name, config) in enumerate(zip("abc", [*KINDS[kind][:1] * 2, KINDS[kind][1]], strict=True)):
        tuner = Tuner([config], base)
        randomize(tuner, seed)
        attach(unet, tuner, name)
    manager = TunerManager.of(unet)
    assert manager is not None
    manager.set_weights(mix)
    return manager


def output(unet: Any, rows: int = 4) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = unet(*make_inputs(rows)).sample
    return found


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SiteWriters, "add_stacked", lambda self, site, x, total: (total, self.at(site)))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_stacked_tuners_equal_tuners_one_by_one(kind: str, mix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = make_unet()
    plain = output(unet)
    attached(unet, kind, MIXES[mix])
    with monkeypatch.context() as alone:
        one_by_one(alone)
        wanted = output(unet)
    found = output(unet)
    assert (wanted - plain).abs().max() > 0.01
    torch.testing.assert_close(found, wanted, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_branches_of_guidance_sites_and_memory_formats(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = make_unet().to(memory_format=torch.channels_last)
    manager = attached(unet, kind, {"a": 1.0, "b": 1.0, "c": 1.0})
    manager.layout = Layout(images=2, guided=True, prompts=2)
    site = next(iter(manager.tuner("a").parts())).writes[0]
    weights = {"a": TunerWeight((1.0, 0.5), on="cond"), "b": TunerWeight(0.5, on="uncond"), "c": {site: 2.0, "*": 0.5}}
    manager.set_weights(weights)
    with monkeypatch.context() as alone:
        one_by_one(alone)
        wanted = output(unet)
    torch.testing.assert_close(output(unet), wanted, atol=3e-6, rtol=1e-5)


def test_changed_parameters_dtypes_and_tuners_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = make_unet()
    manager = attached(unet, "lora", {"a": [1, 0, 1, 0], "b": [0, 1, 0, 0], "c": 1.0})
    output(unet)
    changes = [
        lambda: randomize(manager.tuner("b"), 9),
        lambda: manager.swap("a", manager.tuner("b")),
        lambda: manager.tuner("c").load_state_dict(
            {name: 2 * value for name, value in manager.tuner("c").state_dict().items()}, assign=True
        ),
        lambda: manager.tuner("a").to(torch.float64),
        lambda: [manager.tuner(name).to(torch.bfloat16) for name in "abc"],
        lambda: manager.remove("c"),
    ]
    for change in changes:
        change()
        with monkeypatch.context() as alone:
            one_by_one(alone)
            wanted = output(unet)
        coarse = manager.tuner("a").dtype == torch.bfloat16
        torch.testing.assert_close(output(unet), wanted, atol=2e-2 if coarse else 3e-6, rtol=1e-5)


def test_gradients_reach_every_tuner(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = make_unet()
    manager = attached(unet, "skip", {"a": 0.5, "b": 2.0, "c": 1.0})
    parameters = [parameter for name in "abc" for parameter in manager.tuner(name).parameters()]
    found = torch.autograd.grad(unet(*make_inputs()).sample.square().sum(), parameters)
    one_by_one(monkeypatch)
    wanted = torch.autograd.grad(unet(*make_inputs()).sample.square().sum(), parameters)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_a_hook_on_a_tuner_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = make_unet()
    manager = attached(unet, "skip", {"a": 1.0, "b": 1.0})
    seen: list[str] = []
    manager.tuner("a").get_submodule("skip").register_forward_hook(lambda *_: seen.append("a"))
    manager.set_weights({"a": 1.0, "b": 1.0})
    output(unet)
    assert len(seen) == 12


@pytest.mark.parametrize("kind", KINDS)
def test_three_tuners_for_three_images_take_as_many_kernels_as_one_for_all(kind: str) -> None:
    unet = make_unet()
    manager = attached(unet, kind, {"a": 1.0})
    output(unet, 3)
    with Kernels() as one:
        output(unet, 3)
    for mix in ({"a": [1, 0, 0], "b": [0, 1, 0], "c": [0, 0, 1]}, {"a": 1.0, "b": 0.5, "c": 2.0}):
        manager.set_weights(mix)
        output(unet, 3)
        with Kernels() as three:
            output(unet, 3)
        assert three.count <= 1.05 * one.count
