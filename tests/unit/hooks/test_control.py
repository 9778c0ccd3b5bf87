"""CSC-Tuner: its equation, its encoder, its size, its start."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from restune_diffusion import (
    ConditionError,
    ControlConfig,
    RestuneError,
    SkipConfig,
    Tuner,
    describe_base,
    load_tuner,
    save_tuner,
)
from restune_diffusion.tuners import ControlPart, Features
from restune_diffusion.tuners.configs import parts_from_json, parts_to_json

from ...conftest import SD15, SDXL, make_unet, randomize

WIDTHS = {"block_out_channels": (8, 16, 16, 24), "norm_num_groups": 4}


def make_tuner(config, *others, seed=0, **changes):
    return Tuner.for_base(
        make_unet(**{**WIDTHS, **changes}), config, *others, generator=torch.Generator().manual_seed(seed)
    )


def control(tuner) -> ControlPart:
    return tuner.get_submodule("control")


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def skips_of(tuner, batch=2, size=16, seed=5, dtype=torch.float64):
    return {
        site: draw(batch, tuner.base.sites[site].channels, *[size // tuner.base.sites[site].stride] * 2, seed=seed + n)
        .sub(0.5)
        .to(dtype)
        for n, site in enumerate(control(tuner).writes)
    }


def count(config, *parts):
    with torch.device("meta"):
        base = describe_base(UNet2DConditionModel(**config))
    return Tuner.empty(parts, base).num_parameters()


def test_parameter_counts_on_sd15_are_the_papers():
    one, three = (count(SD15, ControlConfig(level_kernel=kernel)) for kernel in (1, 3))
    assert one == pytest.approx(28.82e6, rel=0.01)
    assert round(one / 1e6, 2) == 28.82
    assert round(three / 1e6, 1) == 99.1
    # 7.9 % of ControlNet's 361.3 million, as published
    assert one / 361.3e6 == pytest.approx(0.0798, abs=5e-5)
    assert count(SD15, ControlConfig(conditions=("a", "b"))) == 2 * one


def test_a_control_tuner_fits_sdxl():
    encoder = count(SDXL, ControlConfig()) - count(SDXL, SkipConfig())
    widths = [256, *[320] * 4, *[640] * 3, *[1280] * 2]
    stem = 448 + 2320 + 4640 + 9248 + 27744 + 83040 + 221440
    assert encoder == stem + sum(a * b + b for a, b in itertools.pairwise(widths))


def test_the_residual_is_the_papers_sum_over_conditions():
    tuner = make_tuner(ControlConfig(conditions=("edges", "colours"), ratio=0.5)).double()
    randomize(tuner, std=0.2)
    part, skips = control(tuner), skips_of(tuner)
    conditions = part.encode([draw(2, 3, 128, 128, seed=1), draw(2, 3, 128, 128, seed=2)], (16, 16))
    features = Features(conditions=conditions, condition_weights=(0.7, -1.3))
    for site, x in skips.items():
        expected = torch.zeros_like(x)
        for number, alpha in enumerate((0.7, -1.3)):
            c = conditions[number][site]
            down_w, down_b, up_w, up_b = (
                tuner.state_dict()[f"control.{site}.{number}.{name}"]
                for name in ("down.weight", "down.bias", "up.weight", "up.bias")
            )
            hidden = torch.einsum("oc,bchw->bohw", down_w, x + c) + down_b[:, None, None]
            hidden = hidden * (1 + torch.special.erf(hidden / math.sqrt(2))) / 2
            expected += alpha * (torch.einsum("oc,bchw->bohw", up_w, hidden) + up_b[:, None, None] + c)
        torch.testing.assert_close(part(site, x, features), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("shortcut", [True, False])
def test_the_encoder_is_a_stem_and_a_chain(kernel, shortcut):
    tuner = make_tuner(ControlConfig(level_kernel=kernel, shortcut=shortcut)).double()
    randomize(tuner, std=0.2)
    values = {key.removeprefix("control.encoders.0."): value for key, value in tuner.state_dict().items()}
    image = draw(1, 3, 128, 128)
    state = image
    for number, stride in enumerate((1, 1, 2, 1, 2, 1, 2)):
        state = F.silu(state) if number else state
        state = F.conv2d(
            state, values[f"stem.{number}.weight"], values[f"stem.{number}.bias"], stride=stride, padding=1
        )
    assert state.shape == (1, 256, 16, 16)
    # SD 1.5: three blocks of two layers and a downsampler, then a block of two layers
    strides = [1, 1, 1, 2, 1, 1, 2, 1, 1, 2, 1, 1]
    (features,) = control(tuner).encode([image], (16, 16))
    for number, stride in enumerate(strides):
        weight, bias = values[f"levels.{number}.weight"], values[f"levels.{number}.bias"]
        c = F.conv2d(F.silu(state), weight, bias, stride=stride, padding=kernel // 2)
        torch.testing.assert_close(features[f"skip.{number}"], c, rtol=0, atol=1e-10)
        carried = torch.zeros_like(c)
        if shortcut:
            pooled = F.avg_pool2d(state, stride)
            kept = min(pooled.shape[1], c.shape[1])
            carried[:, :kept] = pooled[:, :kept]
        state = c + carried


def test_an_image_of_any_size_reaches_the_skips_resolution():
    tuner = make_tuner(ControlConfig())
    randomize(tuner)
    for size in ((16, 16), (9, 13)):
        (features,) = control(tuner).encode([draw(1, 3, 40, 56, dtype=torch.float32)], size)
        assert features["skip.0"].shape[-2:] == size
        # what the base's own downsampling, a 3x3 convolution of stride 2, makes of the size
        deepest = tuple(math.ceil(math.ceil(math.ceil(side / 2) / 2) / 2) for side in size)
        assert features["skip.11"].shape[-2:] == deepest


@pytest.mark.parametrize("config", [ControlConfig(), ControlConfig(conditions=("a", "b"), level_kernel=3, ratio=0.5)])
def test_a_fresh_tuner_adds_nothing(config):
    tuner = make_tuner(config).double()
    images = [draw(2, 3, 128, 128, seed=seed) for seed, _ in enumerate(config.conditions)]
    features = Features(conditions=control(tuner).encode(images, (16, 16)))
    for site, x in skips_of(tuner).items():
        assert not control(tuner)(site, x, features).any()


def train(tuner, steps, seed=0):
    """Pull the residuals towards a map that the condition image gives away; return what moved at each step."""
    part = control(tuner)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.05)
    skips = skips_of(tuner, batch=1)
    image = draw(1, 3, 128, 128, seed=seed)
    moved = []
    for _ in range(steps):
        features = Features(conditions=part.encode([image], (16, 16)))
        target = {site: F.adaptive_avg_pool2d(image.mean(1, keepdim=True), x.shape[-2:]) for site, x in skips.items()}
        loss = sum((part(site, x, features) - target[site]).square().mean() for site, x in skips.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        moved.append({key for key, value in tuner.named_parameters() if value.grad is not None and value.grad.any()})
    return moved


def test_every_parameter_learns_from_the_second_step_on():
    tuner = make_tuner(ControlConfig()).double()
    first, second = train(tuner, 2)
    keys = {key for key, _ in tuner.named_parameters()}
    assert second == keys
    # the zero factors move first: the levels' convolutions and the tuners' second layers
    assert first == {key for key in keys if ".levels." in key or ".up." in key}


def test_the_shortcut_lets_the_image_reach_the_deepest_skip_in_a_few_steps():
    def told_apart(shortcut):
        tuner = make_tuner(ControlConfig(shortcut=shortcut)).double()
        train(tuner, 4)
        one, other = (
            control(tuner).encode([draw(1, 3, 128, 128, seed=seed)], (16, 16))[0]["skip.11"] for seed in (1, 2)
        )
        return ((one - other).norm() / one.norm()).item()

    assert told_apart(True) > 100 * told_apart(False)


def test_two_conditions_add_up():
    tuner = make_tuner(ControlConfig(conditions=("a", "b"))).double()
    randomize(tuner)
    part = control(tuner)
    images = [draw(2, 3, 128, 128, seed=1), draw(2, 3, 128, 128, seed=2)]
    both = part.encode(images, (16, 16))
    first, second = part.encode([images[0], None], (16, 16)), part.encode([None, images[1]], (16, 16))
    assert first[1] == {}
    for site, x in skips_of(tuner).items():
        total = part(site, x, Features(conditions=both, condition_weights=(0.5, 2.0)))
        alone = 0.5 * part(site, x, Features(conditions=first)) + 2.0 * part(site, x, Features(conditions=second))
        torch.testing.assert_close(total, alone, rtol=0, atol=1e-12)
        assert total.any()


def test_rows_select_the_conditions_of_their_images():
    tuner = make_tuner(ControlConfig()).double()
    randomize(tuner)
    part = control(tuner)
    features = Features(conditions=part.encode([draw(3, 3, 128, 128)], (16, 16)))
    rows = torch.tensor([2, 0])
    for site, x in skips_of(tuner, batch=3).items():
        torch.testing.assert_close(
            part(site, x[rows], features.rows(rows)), part(site, x, features)[rows], rtol=0, atol=1e-12
        )


def test_a_missing_or_wrong_image_is_told_in_a_sentence():
    tuner = make_tuner(ControlConfig(conditions=("canny", "palette")))
    part = control(tuner)
    site, x = next(iter(skips_of(tuner).items()))
    with pytest.raises(ConditionError, match="needs an image for 'canny' or 'palette'"):
        part(site, x, Features())
    with pytest.raises(ConditionError, match=r"takes 2 conditions \(canny, palette\), but 1 were given"):
        part.encode([torch.zeros(1, 3, 8, 8)], (1, 1))
    with pytest.raises(ConditionError, match=r"'palette' takes images of shape \(n, 3, height, width\)"):
        part.encode([None, torch.zeros(1, 1, 8, 8)], (1, 1))


def test_a_file_keeps_a_control_tuner_with_a_style_tuner_beside(tmp_path):
    config = ControlConfig(conditions=("canny", "mask"), channels=1, ratio=0.5, level_kernel=3, shortcut=False)
    tuner = make_tuner(config, SkipConfig(ratio=0.25))
    randomize(tuner)
    save_tuner(tuner, tmp_path / "tuner.safetensors")
    loaded = load_tuner(tmp_path / "tuner.safetensors")
    assert loaded.configs == (config, SkipConfig(ratio=0.25))
    assert loaded.state_dict().keys() == tuner.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in tuner.state_dict().items())
    assert "control.encoders.1.levels.11.weight" in loaded.state_dict()
    assert "control.skip.11.1.up.weight" in loaded.state_dict()


def test_names_of_conditions_are_checked():
    assert parts_from_json(parts_to_json([ControlConfig(conditions=("a", "b-2"))]))[0].conditions == ("a", "b-2")
    for names in ("[]", '["a","a"]', '["a.b"]', '[""]'):
        with pytest.raises(RestuneError, match=r"config is not valid"):
            parts_from_json(f'[{{"part":"control","conditions":{names}}}]')


def test_the_seed_decides_the_start():
    first, again, other = (make_tuner(ControlConfig(), seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["control.encoders.0.stem.0.weight"], other["control.encoders.0.stem.0.weight"])


def test_the_stem_keeps_the_size_of_its_signal():
    image = draw(1, 3, 128, 128, dtype=torch.float32)
    tuner = make_tuner(ControlConfig())
    encoder = control(tuner).encoders[0]
    state = image
    for number, layer in enumerate(encoder.stem):
        state = layer(F.silu(state) if number else state)
    assert 0.1 < state.std() < 10
