from __future__ import annotations

import pytest
import torch

from restune_diffusion import BaseMismatchError, BypassConfig, ResConfig, RestuneError, SkipConfig, Tuner, attach
from restune_diffusion.conversion.arithmetic import merge_tuners, reduce_rank
from restune_diffusion.tuners import Features

from ...conftest import make_inputs, make_unet, randomize


def lora(width: int = 4, alpha: float | None = None, **changes) -> ResConfig:
    settings = {"self_attention": "lora", "cross_attention": "lora", "feed_forward": None, **changes}
    return ResConfig(width=width, alpha=alpha, **settings)


def made(unet, config, seed=0, dtype=torch.float32):
    tuner = Tuner.for_base(unet, config)
    randomize(tuner, seed, std=0.2)
    return tuner.to(dtype)


def output(unet, *weighted):
    """Draw with tuners attached, each with its weight."""
    handles = [attach(unet, tuner, str(number), weight) for number, (tuner, weight) in enumerate(weighted)]
    with torch.no_grad():
        result = unet(*make_inputs()).sample
    for handle in handles:
        handle.detach()
    return result


def deltas(tuner):
    """What each layer of a tuner of lora adds to the base's weight, by site."""
    return {site: layer.delta().double() for site, layer in next(tuner.parts()).loras().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_mean_of_two_loras_is_the_mean_of_their_residuals(unet, dtype):
    one, two = made(unet, lora(4, 2.0), 1, dtype), made(unet, lora(3), 2, dtype)
    merged = merge_tuners([one, two], [1.0, 1.0])
    (config,) = merged.configs
    assert config.width == 7
    first, second = deltas(one), deltas(two)
    for site, delta in deltas(merged).items():
        torch.testing.assert_close(delta, (first[site] + second[site]) / 2, rtol=0, atol=1e-6)
    # To the base it makes no difference which is attached, the mean or both at half weight.
    one, two, merged = one.float(), two.float(), merged.float()
    both = output(unet, (one, 0.5), (two, 0.5))
    assert (output(unet) - both).abs().max() > 0.01
    torch.testing.assert_close(output(unet, (merged, 1.0)), both, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("method", "weights", "factors"), [
    ("add", [0.3, -1.5], [0.3, -1.5]), ("stack", [0.3, 2.0], [0.3, 2.0]), ("subtract", [1.0, 0.7], [1.0, -0.7]),
    ("average", [1.0, 3.0], [0.25, 0.75]), ("interpolate", [1.0, 0.3], [0.7, 0.3]),
])  # fmt: skip
def test_every_method_is_an_exact_sum_for_lora(unet, method, weights, factors):
    one, two = made(unet, lora(2), 1), made(unet, lora(5, 1.5, cross_attention=None, feed_forward="lora"), 2)
    expected = output(unet, (one, factors[0]), (two, factors[1]))
    merged = merge_tuners([one, two], weights, method)
    torch.testing.assert_close(output(unet, (merged, 1.0)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("method", "weights", "factors"), [
    ("add", [0.3, -1.5], [0.3, -1.5]), ("stack", [1.0, 1.0], [1.0, 1.0]), ("subtract", [1.0, 0.7], [1.0, -0.7]),
])  # fmt: skip
def test_a_sum_of_skip_tuners_is_exact_in_one_file(unet, method, weights, factors):
    one, two = made(unet, SkipConfig(ratio=0.3), 1), made(unet, SkipConfig(ratio=0.11, sites=("skip.1*",)), 2)
    merged = merge_tuners([one, two], weights, method)
    x = torch.randn(2, 96, 2, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        parts = [next(tuner.parts())("skip.10", x, Features()) for tuner in (one, two, merged)]
    torch.testing.assert_close(parts[2], factors[0] * parts[0] + factors[1] * parts[1], rtol=0, atol=1e-5)
    expected = output(unet, (one, factors[0]), (two, factors[1]))
    assert (output(unet) - expected).abs().max() > 0.01
    torch.testing.assert_close(output(unet, (merged, 1.0)), expected, rtol=0, atol=1e-5)


def test_half_precision_is_kept_where_it_holds_the_sum(unet):
    tuners = [made(unet, SkipConfig(ratio=0.2), seed, torch.float16) for seed in (1, 2)]
    assert merge_tuners(tuners, [1.0, 1.0], "add").dtype == torch.float16
    assert merge_tuners(tuners, [1.0, 0.3], "add").dtype == torch.float32


@pytest.mark.parametrize("config", [SkipConfig(ratio=0.2), BypassConfig(ratio=0.25), ResConfig(width=3)])
def test_other_parts_are_averaged_weight_by_weight(unet, config):
    one, two = made(unet, config, 1), made(unet, config, 2)
    merged = merge_tuners([one, two], [1.0, 3.0])
    assert merged.configs == one.configs
    first, second = one.state_dict(), two.state_dict()
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(value, 0.25 * first[key] + 0.75 * second[key], rtol=1e-6, atol=1e-7)


def test_the_best_lora_of_a_rank(unet):
    tuner = merge_tuners([made(unet, lora(6), seed) for seed in (1, 2)], [1.0, 1.0])
    reduced, kept = reduce_rank(tuner, 5)
    lost = total = 0.0
    for site, delta in deltas(tuner).items():
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        best = u[:, :5] * s[:5] @ v[:5]
        torch.testing.assert_close(deltas(reduced)[site], best, rtol=0, atol=1e-5)
        lost, total = lost + (s[5:] ** 2).sum().item(), total + (s**2).sum().item()
    assert kept == pytest.approx(1 - lost / total, abs=1e-6)
    assert 0.3 < kept < 0.95
    whole, kept = reduce_rank(tuner, 12)
    assert kept == pytest.approx(1)
    torch.testing.assert_close(output(unet, (whole, 1.0)), output(unet, (tuner, 1.0)), rtol=0, atol=1e-5)


def test_what_cannot_be_merged_is_said_in_one_sentence(unet):
    skip, other = made(unet, SkipConfig(ratio=0.2)), made(unet, SkipConfig(ratio=0.3))
    bypass, mixed = made(unet, BypassConfig()), made(unet, ResConfig(self_attention="lora"))
    cases = [
        ([skip, other], [1, 1], "average", "one has ratio = 0.2, another 0.3"),
        ([skip, bypass], [1, 1], "average", "same config"),
        ([bypass, bypass], [1, 1], "add", "The method 'add' supports skip tuners"),
        ([mixed, mixed], [1, 1], "average", "needs tuners with only lora"),
        ([skip, skip], [1, -1], "average", "sum to zero; their sum must not be zero"),
        ([skip] * 3, [1, 1, 1], "interpolate", "needs exactly two tuners, but 3 are given"),
        ([skip, skip], [1, float("nan")], "add", "finite"),
        ([skip, skip], [1], "add", "2 tuners but 1 weights; give one weight per tuner"),
        ([skip] * 9, [1] * 9, "add", None),
        ([made(unet, SkipConfig(ratio=5))] * 2, [1, 1], "add", "no equivalent tuner: ratio"),
    ]
    for tuners, weights, method, message in cases:
        if message is None:
            merge_tuners(tuners, weights, method)
            continue
        with pytest.raises(RestuneError, match=message):
            merge_tuners(tuners, weights, method)
    elsewhere = made(make_unet(block_out_channels=(32, 32, 64, 64)), SkipConfig(ratio=0.2))
    with pytest.raises(BaseMismatchError, match="block_out_channels"):
        merge_tuners([skip, elsewhere], [1, 1], "add")
    for rank, tuner in ((0, made(unet, lora())), (2, skip)):
        with pytest.raises(RestuneError, match=r"rank must be a positive number|Only a tuner of lora alone"):
            reduce_rank(tuner, rank)
