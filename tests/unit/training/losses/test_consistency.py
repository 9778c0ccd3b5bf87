"""PACE's consistency: the equation, the noise of each sample, and runs that repeat, resume and share passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from restune_diffusion.data.captions import find_examples
from restune_diffusion.data.training_images import load_samples
from restune_diffusion.hooks.attachment import attach
from restune_diffusion.storage.tuner_file import load_tuner, read_info, save_tuner
from restune_diffusion.training import TrainConfig, sweep, train
from restune_diffusion.training.build import build_accelerator, build_training_state
from restune_diffusion.training.feature_cache.tap_features import record_features
from restune_diffusion.training.inputs import prepared
from restune_diffusion.training.latents.batches import Batches
from restune_diffusion.training.latents.cache import build_cache
from restune_diffusion.training.losses.consistency import TunerNoise, falling_sigmas, sigmas_by_site
from restune_diffusion.training.losses.objective import Objective
from restune_diffusion.training.trainer import acting
from restune_diffusion.tuners import Features
from restune_diffusion.tuners.configs import BypassConfig, ResConfig, SkipConfig
from restune_diffusion.tuners.tuner import Tuner
from restune_diffusion.utils.seeds import seeded

from ....conftest import make_unet, randomize
from ....tiny_training import sd_pipeline
from ..test_train import assert_same

MakeConfig = Callable[..., TrainConfig]


def first_loss(config: TrainConfig, pipeline: Any) -> float:
    """The loss of the first batch, of the parameters that `randomize` gives."""
    accelerator = build_accelerator(config)
    with prepared(config, accelerator, pipeline) as inputs:
        run = build_training_state(config, accelerator, inputs)
        randomize(run.tuner, std=0.3)
        assert run.image_loss is not None
        with acting(run):
            return run.image_loss.loss(run, run.batches[1], 1).item()


def batch_of(pipeline: Any, images: Path, size: int) -> Any:
    cache = build_cache(pipeline, load_samples(find_examples(images), 16))
    return Batches(
        cache, seed=3, size=size, timesteps=1000, caption_dropout=0, device=torch.device("cpu"), dtype=torch.float32
    )[1]  # fmt: skip


def by_hand(
    pipeline: Any, images: Path, predict: Callable[[torch.Tensor, Any, int, torch.Generator], torch.Tensor]
) -> float:
    """`mse(f_1, noise) + 0.5 mean |f_1 - f_2|^2`, row by row; `predict` gets a row, its number and its generator."""
    batch, losses, distances = batch_of(pipeline, images, 2), [], []
    noisy = Objective(pipeline.scheduler).add_noise(batch.latents, batch.noise, batch.timesteps)
    for row in range(2):
        # Row of batch 1 of two rows: positions 2 and 3.
        draws = [seeded(3, "consistency", 2 * (2 + row) + draw) for draw in range(2)]
        one, two = (predict(noisy[row : row + 1], batch, row, generator) for generator in draws)
        losses.append((one - batch.noise[row]).square().mean())
        distances.append((one - two).square().mean())
    return float(sum(losses) / 2 + 0.5 * sum(distances) / 2)


@torch.no_grad()
def test_the_loss_of_a_skip_tuner_is_the_equation(config: MakeConfig, images: Path) -> None:
    settings = config(seed=3, consistency=0.5, consistency_sigma=0.6)
    pipeline = sd_pipeline()
    pipeline.unet.eval()
    tuner = Tuner.for_base(pipeline.unet, SkipConfig())
    randomize(tuner, std=0.3)

    def predict(noisy: torch.Tensor, batch: Any, row: int, generator: torch.Generator) -> torch.Tensor:
        own = tuner.copy()
        # The deepest up block is first, and takes three skips. Sigma falls from skip.11 to skip.0.
        for number in (9, 10, 11, 6, 7, 8, 3, 4, 5, 0, 1, 2):
            up = own.get_submodule(f"skip.skip.{number}.up")
            factor = 1 + 0.6 * (number + 1) / 12 * torch.randn(up.out_features, generator=generator)
            up.weight.mul_(factor[:, None])
            up.bias.mul_(factor)
        states = batch.inputs["encoder_hidden_states"][row : row + 1]
        with attach(pipeline.unet, own):
            found: torch.Tensor = pipeline.unet(noisy, batch.timesteps[row : row + 1], states).sample
        return found

    expected = by_hand(pipeline, images, predict)
    assert first_loss(settings, sd_pipeline()) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_the_loss_of_a_bypass_is_the_equation_on_one_pass_of_the_base(config: MakeConfig, images: Path) -> None:
    settings = config(seed=3, tuner="bypass", consistency=0.5, consistency_sigma=0.6)
    pipeline = sd_pipeline()
    pipeline.unet.eval()
    tuner = Tuner.for_base(pipeline.unet, BypassConfig())
    randomize(tuner, std=0.3)
    part = tuner.get_submodule("bypass")

    def predict(noisy: torch.Tensor, batch: Any, row: int, generator: torch.Generator) -> torch.Tensor:
        states = batch.inputs["encoder_hidden_states"][row : row + 1]
        features = record_features(pipeline.unet, part.taps, noisy, batch.timesteps[row : row + 1], states)
        time = part.time(torch.nn.functional.silu(features.time))
        state = None
        for number, tap in enumerate(part.taps):
            state = part.at_site[tap](features.by_site[tap], state, time)
            state *= 1 + (0.6, 0.3)[number] * torch.randn(state.shape[1], generator=generator)[None, :, None, None]
        residual = torch.einsum("oc,bchw->bohw", part.gate.weight, state) + part.gate.bias[:, None, None]
        unet = pipeline.unet
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(features.by_site["out"] + residual)))

    rows: list[int] = []
    other = sd_pipeline()
    other.unet.mid_block.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    assert first_loss(settings, other) == pytest.approx(by_hand(pipeline, images, predict), rel=1e-5)
    assert rows == [2], "one pass of the base, with one row for each image"


def test_sigma_falls_with_depth() -> None:
    assert falling_sigmas(["a", "b", "c", "d"], 0.8) == pytest.approx({"a": 0.8, "b": 0.6, "c": 0.4, "d": 0.2})
    unet = make_unet()
    tuner = Tuner.for_base(unet, SkipConfig(), ResConfig(self_attention="lora", sites=("up.2.*", "down.0.*")))
    skip, res = tuner.parts()
    assert sigmas_by_site(skip, tuner.base, 1.0) == pytest.approx(
        {f"skip.{number}": (number + 1) / 12 for number in range(12)}
    )
    sigmas = sigmas_by_site(res, tuner.base, 1.0)
    # Two transformer blocks on the way down, then three: all tuners of a block have the noise of its depth.
    expected = {"down.0.attn.0": 1.0, "down.0.attn.1": 0.8, "up.2.attn.0": 0.6, "up.2.attn.1": 0.4, "up.2.attn.2": 0.2}
    assert sigmas == pytest.approx({site: expected[site.split(".block")[0]] for site in res.writes})
    assert {site.rpartition("block.0.")[2] for site in sigmas} == {
        "ff", "self.to_q", "self.to_k", "self.to_v", "self.to_out.0",
    }  # fmt: skip


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("config", [ResConfig(), SkipConfig()])
def test_a_rows_noise_is_its_own_and_ends_with_the_context(config: Any) -> None:
    tuner = Tuner.for_base(make_unet(), config)
    randomize(tuner)
    part = next(tuner.parts())
    site = part.writes[0]
    channels = tuner.base.sites[site].channels
    shape = (2, 5, channels) if config.part == "res" else (2, channels, 3, 4)
    x, noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)), TunerNoise(tuner, 0.5)
    plain = part(site, x, Features())
    with noise.applied(generators([1, 2])):
        noisy = part(site, x, Features())
    with noise.applied(generators([7, 2])):
        other = part(site, x, Features())
    sigma = sigmas_by_site(part, tuner.base, 0.5)[site]
    for row, seed in enumerate((1, 2)):
        factor = 1 + sigma * torch.randn(channels, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(noisy[row], plain[row] * (factor if x.dim() == 3 else factor[:, None, None]))
    assert torch.equal(noisy[1], other[1])
    assert not torch.equal(noisy[0], other[0])
    assert torch.equal(part(site, x, Features()), plain)


def test_it_is_off_by_default_and_recorded_when_it_is_on(config: MakeConfig, tmp_path: Path) -> None:
    plain = train(config(output=tmp_path / "plain"), verbose=False)
    assert "consistency" not in read_info(plain.path).training["config"]
    on = train(config(output=tmp_path / "on", consistency=0.5), verbose=False)
    assert read_info(on.path).training["config"]["consistency"] == 0.5
    assert read_info(on.path).configs == read_info(plain.path).configs, "the file is that of an ordinary tuner"
    one, other = (load_tuner(result.path).state_dict() for result in (plain, on))
    assert one.keys() == other.keys()
    assert not all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("tuner", ["skip", "bypass", ["skip", "text"]])
def test_a_resumed_run_equals_the_uninterrupted_one(config: MakeConfig, tmp_path: Path, tuner: Any) -> None:
    settings = {"tuner": tuner, "consistency": 0.5, "caption_dropout": 0.3, "text": {"rank": 2}}
    if "text" not in tuner:
        del settings["text"]
    train(config(steps=2, checkpoint_every=2, **settings), verbose=False)
    resumed = train(config(steps=4, checkpoint_every=9, resume=True, **settings), verbose=False)
    assert len(resumed.losses) == 2
    assert_same(resumed.path, train(config(output=tmp_path / "whole", **settings), verbose=False).path)


def test_two_small_batches_equal_one(config: MakeConfig, tmp_path: Path) -> None:
    one = train(config(consistency=0.5, batch_size=4), verbose=False)
    two = train(
        config(output=tmp_path / "two", consistency=0.5, batch_size=2, gradient_accumulation_steps=2), verbose=False
    )
    assert one.losses == pytest.approx(two.losses, rel=1e-4)


def test_tuners_of_a_sweep_share_passes_and_equal_those_trained_alone(config: MakeConfig, tmp_path: Path) -> None:
    pipeline, rows = sd_pipeline(), []
    settings = {"tuner": "bypass", "consistency": 0.5}
    pipeline.unet.mid_block.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    result = sweep(config(sweep="consistency=0.5,2", **settings), pipeline=pipeline, verbose=False)
    assert rows == [2] * 4, "one pass of the base in each of 4 steps, for two tuners with two draws each"
    for row, weight in zip(result.rows, (0.5, 2.0), strict=True):
        alone = config(output=tmp_path / f"alone{weight}", **{**settings, "consistency": weight})
        assert row.file is not None
        assert_same(row.file, train(alone, pipeline=sd_pipeline(), verbose=False).path)


def test_a_bypass_trains_from_the_feature_cache(config: MakeConfig, tmp_path: Path) -> None:
    settings = {"tuner": "bypass", "consistency": 0.5, "feature_cache": 2, "feature_cache_dtype": "fp32"}
    first = train(config(**settings), verbose=False)
    again = train(config(output=tmp_path / "again", feature_cache_dir=tmp_path / "other", **settings), verbose=False)
    assert_same(first.path, again.path)
    plain = train(config(output=tmp_path / "plain", **{**settings, "consistency": None}), verbose=False)
    assert plain.losses[0] == pytest.approx(first.losses[0], rel=1e-6), "a fresh tuner has no noise"
    assert plain.losses[1:] != first.losses[1:]


@pytest.mark.parametrize(
    "settings",
    [
        {"tuner": "control", "control": {"conditions": ["palette"]}},
        {"masked_loss": "alpha", "noise_offset": 0.1, "input_perturbation": 0.1, "snr_gamma": 5},
        {"tuner": "bypass", "preservation": "output", "class_prompt": "a disc"},
        {"tuner": "res", "mixed_precision": "bf16"},
        {"tuner": "bypass", "teacher": "teacher.safetensors"},
    ],
    ids=str,
)
def test_a_fresh_tuner_has_the_plain_loss_and_no_distance(
    config: MakeConfig, tmp_path: Path, settings: dict[str, Any]
) -> None:
    losses = []
    if "teacher" in settings:
        teacher = Tuner.for_base(sd_pipeline().unet, SkipConfig())
        randomize(teacher)
        save_tuner(teacher, tmp_path / settings["teacher"])
        settings = {**settings, "teacher": str(tmp_path / settings["teacher"])}
    for weight in (None, 5.0):
        made = config(output=tmp_path / str(weight), steps=1, consistency=weight, **settings)
        losses += train(made, pipeline=sd_pipeline(), verbose=False).losses
    assert losses[1] == pytest.approx(losses[0], rel=2e-2 if "mixed_precision" in settings else 1e-5)
    # Against the noise it is about 1; the teacher changes the base's predictions by little.
    assert (losses[0] < 0.5) == ("teacher" in settings)


def test_a_large_weight_brings_the_draws_together(config: MakeConfig, images: Path, tmp_path: Path) -> None:
    pipeline = sd_pipeline()
    batch = batch_of(pipeline, images, 6)
    noisy = Objective(pipeline.scheduler).add_noise(batch.latents, batch.noise, batch.timesteps)
    distances = []
    for weight in (0.0, 30.0):
        settings = config(output=tmp_path / f"{weight}", consistency=weight, steps=12, learning_rate=1e-2)
        tuner = load_tuner(train(settings, pipeline=pipeline, verbose=False).path)
        draws = []
        with torch.no_grad(), attach(pipeline.unet, tuner):
            for seed in (0, 100):
                with TunerNoise(tuner, 1.0).applied(generators(range(seed, seed + 6))):
                    draws.append(pipeline.unet(noisy, batch.timesteps, **batch.inputs).sample)
        distances.append((draws[0] - draws[1]).square().mean().item())
    assert distances[1] < 0.5 * distances[0], distances


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"consistency_sigma": 0.5}, "consistency_sigma needs consistency"),
        ({"consistency": 1, "gradient_checkpointing": True}, "computes outputs again without the noise"),
        ({"consistency": 1, "tuner": "text", "text": {"rank": 2}}, "acts on the text encoders only"),
    ],
)
def test_what_does_not_go_together_is_refused(config: MakeConfig, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)
