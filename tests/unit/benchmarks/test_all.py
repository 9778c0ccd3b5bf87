"""Peers, kept rows and the page of `benchmarks.all`."""

from __future__ import annotations

import pytest
import torch

from benchmarks.all import page, peers
from benchmarks.all.rows import Rows, timed_rows
from restune_diffusion import SkipConfig, Tuner, attach

from ...conftest import make_inputs, make_unet, randomize

FACTS = {"device": "CPU", "machine": "m", "pixels": 64, "dry": False, "versions": {"torch": "1"}}
needs_swift = pytest.mark.skipif(not peers.has_swift(), reason="needs ms-swift==4.6.0, run make peers; and einops")

_NAMES = {"ln1.weight": "down.weight", "ln1.bias": "down.bias", "ln2.weight": "up.weight", "ln2.bias": "up.bias"}


def output(unet):
    with torch.no_grad():
        return unet(*make_inputs()).sample


@needs_swift
def test_ms_swifts_adapters_on_the_skips_are_our_skip_tuner():
    unet = make_unet()
    plain = output(unet)
    tuner = Tuner.for_base(unet, SkipConfig(ratio=1.0))
    randomize(tuner)
    with attach(unet, tuner):
        expected = output(unet)
    adapters = peers.add_sce_tuner(unet)
    torch.testing.assert_close(output(unet), plain, rtol=0, atol=1e-5)
    # The adapters are in the order in which the decoder reads the skips, deep to shallow.
    for number, adapter in enumerate(adapters):
        ours = tuner.get_submodule(f"skip.skip.{len(adapters) - 1 - number}").state_dict()
        adapter.load_state_dict({theirs: ours[own] for theirs, own in _NAMES.items()})
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(output(unet), expected, rtol=0, atol=1e-4)


@needs_swift
def test_ms_swifts_bypass_starts_at_zero_and_keeps_gradients_out_of_the_base():
    unet = make_unet()
    plain = output(unet)
    chain = peers.add_swift_bypass(unet)
    torch.testing.assert_close(output(unet), plain, rtol=0, atol=1e-5)
    randomize(chain)
    assert (output(unet) - plain).abs().max() > 1e-2
    unet.requires_grad_(True)
    unet(*make_inputs()).sample.square().mean().backward()
    assert all(parameter.grad is not None for parameter in chain.parameters())
    assert {name for name, parameter in unet.named_parameters() if parameter.grad is not None} == {
        "conv_norm_out.weight", "conv_norm_out.bias", "conv_out.weight", "conv_out.bias"
    }  # fmt: skip


def test_rows_that_are_finished_are_not_run_again(tmp_path):
    calls = []

    def run():
        calls.append(1)
        return [{"what": "a", "seconds": 1.0}]

    for _ in range(2):
        rows = Rows(tmp_path / "all.json", FACTS)
        assert rows.finish("group", run) == [{"what": "a", "seconds": 1.0}]
    assert len(calls) == 1
    with pytest.raises(KeyboardInterrupt):
        rows.finish("other", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert list(Rows(tmp_path / "all.json", FACTS).groups) == ["group"]
    # Rows of another machine or version are not mixed with new ones.
    assert not Rows(tmp_path / "all.json", {**FACTS, "machine": "other"}).groups


def test_a_ratio_is_taken_within_each_round():
    fast, slow = timed_rows({"fast": [1.0, 10.0, 2.0], "slow": [2.0, 20.0, 4.0]}, "slow")
    assert (fast["ratio"], slow["ratio"], fast["seconds"], fast["low"], fast["high"]) == (0.5, 1.0, 2.0, 1.0, 10.0)


def test_a_target_is_met_by_its_figure_alone(tmp_path):
    rows = Rows(tmp_path / "all.json", FACTS)
    rows.groups["g"] = [{"what": "ours", "seconds": 0.012}, {"what": "theirs", "seconds": 0.01}]
    ratio = page.Target("r", "g", "ours", "seconds", 1.25, "theirs")
    assert ratio.line(rows) == "| r | <= 1.25 | 1.2 | met |"
    assert page.Target("r", "g", "ours", "seconds", 1.1, "theirs", why="w").line(rows).endswith("| not met: w |")
    assert page.Target("r", "g", "ours", "seconds", 1.1, "theirs", at_least=True).line(rows).endswith("| met |")
    assert page.Target("s", "g", "ours", "seconds", 10, unit="ms").line(rows) == "| s | <= 10 ms | 12 ms | not met |"
    assert page.Target("n", "h", "ours", "seconds", 10).line(rows) == "| n | <= 10 | not measured yet | |"
