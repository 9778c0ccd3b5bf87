import math

import pytest
import torch
from diffusers import UNet2DConditionModel

from restune_diffusion import BypassConfig, RestuneError, SkipConfig, Tuner, describe_base
from restune_diffusion.tuners import Features, SkipTuner
from restune_diffusion.tuners.bypass import BypassStage

from ...conftest import SD15, SDXL, make_unet, randomize


def count(config, *parts):
    with torch.device("meta"):
        base = describe_base(UNet2DConditionModel(**config))
    return Tuner.empty(parts, base).num_parameters()


def test_parameter_counts_of_sc_tuner_are_the_papers():
    assert count(SD15, SkipConfig(ratio=1.0)) == 19_680_000
    assert count(SD15, SkipConfig(ratio=1.0)) == sum(2 * d * d + 2 * d for d in [320] * 4 + [640] * 3 + [1280] * 5)
    assert count(SDXL, SkipConfig(ratio=1.0)) == sum(2 * d * d + 2 * d for d in [320] * 4 + [640] * 3 + [1280] * 2)
    assert round(count(SDXL, SkipConfig(ratio=1.0)) / 1e6, 2) == 9.84
    assert round(count(SD15, SkipConfig(ratio=0.1)) / 1e6, 2) == 1.98


def test_skip_tuner_is_its_equation():
    tuner = SkipTuner(6, 4).double()
    randomize(tuner, std=1.0)
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.empty_like(x)
    for image, row, column in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)).tolist():
        hidden = tuner.down.weight @ x[image, :, row, column] + tuner.down.bias
        hidden = torch.tensor([0.5 * h * (1 + math.erf(h / math.sqrt(2))) for h in hidden.tolist()]).double()
        expected[image, :, row, column] = tuner.up.weight @ hidden + tuner.up.bias
    torch.testing.assert_close(tuner(x), expected, rtol=0, atol=1e-6)


def horizontal_by_hand(tuner, tap, time):
    """`GELU(r + depthwise(r))` of `r = (W x + b) (1 + scale(t)) + shift(t)` on the normalised tap."""
    normal = (tap - tap.mean((1, 2, 3), keepdim=True)) / (tap.var((1, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    read = torch.einsum("oc,bchw->bohw", tuner.down.weight, normal) + tuner.down.bias[:, None, None]
    scale, shift = (time @ tuner.film.weight.T + tuner.film.bias).chunk(2, dim=1)
    read = read * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    padded = torch.nn.functional.pad(read, (1, 1, 1, 1))
    mixed = torch.zeros_like(read)
    for row, column in torch.cartesian_prod(torch.arange(3), torch.arange(3)).tolist():
        window = padded[:, :, row : row + read.shape[2], column : column + read.shape[3]]
        mixed += window * tuner.mix.weight[:, 0, row, column, None, None]
    summed = read + mixed + tuner.mix.bias[:, None, None]
    return 0.5 * summed * (1 + torch.erf(summed / math.sqrt(2)))


def test_bypass_stage_is_its_equation():
    stage = BypassStage(tap_channels=6, channels=5, in_channels=4, expansion=2.0).double()
    randomize(stage, std=0.5)
    generator = torch.Generator().manual_seed(0)
    tap, state, time = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in ((2, 6, 4, 4), (2, 4, 4, 4), (2, 64))
    )
    lam = 1 / (1 + math.exp(-stage.logit.item()))
    horizontal = horizontal_by_hand(stage.horizontal, tap, time)
    expected = lam * horizontal + (1 - lam) * stage.vertical(state, time, tap.shape[-2:])
    torch.testing.assert_close(stage(tap, state, time), expected, rtol=0, atol=1e-10)


def test_the_usual_taps_are_the_first_and_the_last_feature():
    unet = make_unet()
    assert Tuner.for_base(unet, BypassConfig()).bypass.taps == ("skip.0", "up.3")
    assert len(Tuner.for_base(unet, BypassConfig(taps=("*",))).bypass.taps) == 12 + 1 + 4
    with torch.device("meta"):
        xl = describe_base(UNet2DConditionModel(**SDXL))
    assert Tuner.empty((BypassConfig(),), xl).bypass.taps == ("skip.0", "up.2")


def test_lam_starts_at_one_half():
    tuner = Tuner.for_base(make_unet(), BypassConfig(taps=("*",)))
    logits = [value for key, value in tuner.state_dict().items() if key.endswith("logit")]
    assert len(logits) == 12 + 1 + 4 - 1
    assert all(torch.sigmoid(logit) == 0.5 for logit in logits)


def test_bypass_keeps_the_gradient_from_what_it_taps():
    tuner = Tuner.for_base(make_unet(), BypassConfig())
    randomize(tuner)
    part = next(tuner.parts())
    taps = {
        name: torch.randn(1, site.channels, 16 // site.stride, 16 // site.stride, requires_grad=True)
        for name, site in tuner.base.sites.items()
    }
    time = torch.randn(1, tuner.base.time_channels, requires_grad=True)
    part("out", taps["out"], Features(by_site=taps, time=time)).square().mean().backward()
    assert all(value.grad is None for value in [time, *taps.values()])
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in tuner.parameters())


def test_only_one_gate_starts_at_zero():
    tuner = Tuner.for_base(make_unet(), BypassConfig())
    zero = [key for key, value in tuner.state_dict().items() if not value.any() and not key.endswith("logit")]
    assert zero == ["bypass.gate.weight", "bypass.gate.bias"]


@pytest.mark.parametrize("config", [SkipConfig(ratio=0.5), BypassConfig(ratio=0.25)])
def test_the_seed_decides_the_start(config):
    unet = make_unet()
    first, again, other = (
        Tuner.for_base(unet, config, generator=torch.Generator().manual_seed(seed)).state_dict() for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_sites_are_chosen_by_pattern():
    unet = make_unet()
    tuner = Tuner.for_base(unet, SkipConfig(sites=("skip.1", "skip.1?")))
    assert next(tuner.parts()).writes == ("skip.1", "skip.10", "skip.11")
    with pytest.raises(RestuneError, match=r"No site matches `skip.12`; this base has skip.0, "):
        Tuner.for_base(unet, SkipConfig(sites=("skip.12",)))


def test_a_tuner_needs_parts_of_different_kinds():
    unet = make_unet()
    assert Tuner.for_base(unet, SkipConfig(), BypassConfig()).num_parameters() > 0
    with pytest.raises(RestuneError, match="each of another family"):
        Tuner.for_base(unet, SkipConfig(), SkipConfig(ratio=0.5))
    with pytest.raises(RestuneError, match="one or more parts"):
        Tuner.for_base(unet)
