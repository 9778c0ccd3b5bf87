"""Forms of the bypass after SHERL and LoSA: their equations, and all that a bypass does."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import gelu, interpolate
from transformers import ViTConfig, ViTModel

from restune_diffusion import BypassConfig, RestuneError, Tuner, attach, load_tuner, save_tuner
from restune_diffusion.hooks.manager import TunerManager
from restune_diffusion.training.feature_cache.tap_features import predict_from_features, record_features
from restune_diffusion.tuners import Features
from restune_diffusion.tuners.configs import parts_from_json, parts_to_json
from restune_diffusion.tuners.side_networks.mixers import GRID, LowRankMixer, MixerStage
from restune_diffusion.tuners.side_networks.redundancy import RedundancyAggregation

from ...conftest import make_inputs, make_unet, randomize

FORMS = [BypassConfig(form="redundancy"), BypassConfig(form="mixers", mixer_rank=6)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(one @ other / one.norm() / other.norm())


def test_redundancy_is_its_equation_at_every_position() -> None:
    taps, channels = 4, 5
    layer = RedundancyAggregation(channels).double()
    randomize(layer, std=1.0)
    reads = [normal(2, channels, 3, 2, seed=seed) for seed in range(taps)]
    expected = torch.zeros(2, channels, 3, 2, dtype=torch.float64)
    silent = 0
    for image, row, column in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(2)).tolist():
        vectors = [read[image, :, row, column] for read in reads]
        n = [(v - v.mean()) / (v.var(correction=0) + 1e-5).sqrt() for v in vectors]
        scores = []
        for one in n[:-1]:
            redundancy = sum(max(0.0, cosine(one, other)) for other in n[:-1])
            score = float(layer.score.weight[0] @ (one * n[-1]) + layer.score.bias)
            scores.append(max(0.0, score) / redundancy)
        silent += not any(scores)
        weights = [score / (sum(scores) + 1e-8) for score in scores]
        expected[image, :, row, column] = n[-1] + sum(weight * one for weight, one in zip(weights, n, strict=False))
    assert silent < 12, "some positions have weights"
    torch.testing.assert_close(layer(reads), expected, rtol=0, atol=1e-6)


def test_a_tap_that_repeats_another_counts_half_at_the_start() -> None:
    layer = RedundancyAggregation(4).double()
    layer.reset_parameters()
    one, other, deep = torch.eye(4, dtype=torch.float64)[:3]
    shallow = torch.stack([one, one, other])
    assert layer.weights(shallow, deep[None]).flatten().tolist() == pytest.approx([0.25, 0.25, 0.5], abs=1e-6)


def test_a_channel_mixer_is_its_equation() -> None:
    mixer = LowRankMixer(5, 3, tokens=False).double()
    randomize(mixer, std=0.5)
    x = normal(2, 5, 4, 6)
    hidden = torch.einsum("rc,bchw->brhw", mixer.down.weight, x) + mixer.down.bias[:, None, None]
    activated = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    expected = torch.einsum("cr,brhw->bchw", mixer.up.weight, activated) + mixer.up.bias[:, None, None]
    torch.testing.assert_close(mixer(x), expected, rtol=0, atol=1e-10)


def test_a_token_mixer_is_its_equation_on_its_grid() -> None:
    mixer = LowRankMixer(5, 3, tokens=True).double()
    randomize(mixer, std=0.5)
    x = normal(2, 5, GRID, GRID)
    tokens = x.flatten(2)
    hidden = torch.einsum("rt,bct->bcr", mixer.down.weight, tokens) + mixer.down.bias
    expected = torch.einsum("tr,bcr->bct", mixer.up.weight, gelu(hidden)) + mixer.up.bias
    torch.testing.assert_close(mixer(x), expected.view_as(x), rtol=0, atol=1e-10)


def test_a_token_mixer_takes_any_resolution() -> None:
    mixer = LowRankMixer(5, 3, tokens=True).double()
    randomize(mixer, std=0.5)
    small = normal(1, 5, GRID, GRID)
    # Every token twice as high and three times as wide: the grid sees the same image.
    large = small.repeat_interleave(2, 2).repeat_interleave(3, 3)
    expected = interpolate(mixer(small), size=(2 * GRID, 3 * GRID), mode="bilinear")
    torch.testing.assert_close(mixer(large), expected)
    assert mixer(normal(1, 5, 2, 3)).shape == (1, 5, 2, 3)


def test_a_mixer_stage_is_its_equation() -> None:
    stage = MixerStage(tap_channels=6, channels=5, in_channels=4, rank=3, tokens=True).double()
    randomize(stage, std=0.5)
    tap, state, time = normal(2, 6, 4, 4), normal(2, 4, 2, 2, seed=1), normal(2, 64, seed=2)
    standard = (tap - tap.mean((1, 2, 3), keepdim=True)) / (
        tap.var((1, 2, 3), correction=0, keepdim=True) + 1e-5
    ).sqrt()
    read = torch.einsum("oc,bchw->bohw", stage.down.weight, standard) + stage.down.bias[:, None, None]
    scale, shift = (time @ stage.film.weight.T + stage.film.bias).chunk(2, dim=1)
    read = read * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    wide = torch.einsum("oc,bchw->bohw", stage.transition.weight, state) + stage.transition.bias[:, None, None]
    before = wide.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(stage(tap, state, time), before + stage.mixer(read + before), rtol=0, atol=1e-10)


def test_channels_and_tokens_alternate_and_channels_come_last() -> None:
    part = next(Tuner.for_base(make_unet(), BypassConfig(form="mixers")).parts())
    assert len(part.taps) == 12 + 1 + 4
    stages = list(part.at_site.values())
    assert stages[0].mixer is None
    assert [stage.mixer.tokens for stage in reversed(stages[1:])] == [False, True] * 8


@pytest.mark.parametrize("config", FORMS, ids=lambda config: config.form)
def test_it_starts_as_the_base_learns_without_it_and_survives_a_file(config: BypassConfig, tmp_path: Path) -> None:
    unet = make_unet()
    tuner = Tuner.for_base(unet, config, generator=torch.Generator().manual_seed(0))
    sample, timestep, states = make_inputs()
    wide = torch.randn(2, 4, 8, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = unet(sample, timestep, states).sample
        with attach(unet, tuner):
            assert torch.equal(unet(sample, timestep, states).sample, plain)
        randomize(tuner)
        with attach(unet, tuner):
            acted = [unet(x, timestep, states).sample for x in (sample, wide)]
        save_tuner(tuner, tmp_path / "t.safetensors")
        loaded = load_tuner(tmp_path / "t.safetensors")
        assert loaded.configs == (config,)
        features = [record_features(unet, loaded.bypass.taps, x, timestep, states) for x in (sample, wide)]
        again = [predict_from_features(unet, loaded, each) for each in features]
    assert (acted[0] - plain).abs().max() > 1e-3
    assert all(torch.equal(one, other) for one, other in zip(acted, again, strict=True))


@pytest.mark.parametrize("config", FORMS, ids=lambda config: config.form)
def test_gradients_reach_every_parameter_and_no_tap(config: BypassConfig) -> None:
    tuner = Tuner.for_base(make_unet(), config)
    randomize(tuner)
    taps = {
        name: torch.randn(1, site.channels, 16 // site.stride, 16 // site.stride, requires_grad=True)
        for name, site in tuner.base.sites.items()
    }
    time = torch.randn(1, tuner.base.time_channels, requires_grad=True)
    tuner.bypass("out", taps["out"], Features(by_site=taps, time=time)).square().mean().backward()
    assert all(value.grad is None for value in [time, *taps.values()])
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in tuner.parameters())


def test_two_forms_on_rows_of_one_batch_act_as_each_alone() -> None:
    unet = make_unet()
    sample, timestep, states = make_inputs()
    tuners = [Tuner.for_base(unet, config) for config in (*FORMS, BypassConfig())]
    for number, tuner in enumerate(tuners):
        randomize(tuner, seed=number)
    weights = [(1.0, 0.0), (0.5, 1.0), (0.0, 0.7)]
    with torch.no_grad():
        plain = unet(sample, timestep, states).sample
        with attach(unet, tuners[0], "0", 1.0), attach(unet, tuners[1], "1", 1.0), attach(unet, tuners[2], "2", 1.0):
            manager = TunerManager.of(unet)
            assert manager is not None
            manager.set_weights({str(number): weight for number, weight in enumerate(weights)})
            mixed = unet(sample, timestep, states).sample
            for row in range(2):
                manager.set_weights({str(number): weight[row] for number, weight in enumerate(weights)})
                alone = unet(sample, timestep, states).sample[row]
                torch.testing.assert_close(mixed[row], alone, rtol=1e-4, atol=1e-5)
                assert (alone - plain[row]).abs().max() > 1e-3


def test_files_of_the_chain_say_nothing_of_the_other_forms() -> None:
    assert parts_to_json([BypassConfig()]) == '[{"part":"bypass","ratio":0.5,"expansion":2.0,"taps":[]}]'
    for config in FORMS:
        assert parts_from_json(parts_to_json([config])) == (config,)
    assert BypassConfig(**BypassConfig(form="mixers").model_dump()) == BypassConfig(form="mixers")


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(RestuneError, match=r"needs 3 taps or more, but has skip\.0, up\.3; leave bypass.taps out"):
        Tuner.for_base(make_unet(), BypassConfig(form="redundancy", taps=("skip.0", "up.3")))
    vit = ViTModel(
        ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, image_size=16,
                  patch_size=4),
        add_pooling_layer=False,
    )  # fmt: skip
    with pytest.raises(RestuneError, match=r"block\.0 of this base has tokens outside the grid"):
        Tuner.for_base(vit, BypassConfig(form="mixers"))
    tuner = Tuner.for_base(vit, BypassConfig(form="redundancy"))
    randomize(tuner)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = vit(pixels).last_hidden_state
        with attach(vit, tuner):
            assert (vit(pixels).last_hidden_state - plain).abs().max() > 1e-3
