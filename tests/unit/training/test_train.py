from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from restune_diffusion.data.captions import find_examples
from restune_diffusion.data.training_images import load_samples
from restune_diffusion.hooks.attachment import attach
from restune_diffusion.hooks.manager import TunerManager
from restune_diffusion.pipelines.load_base import load_base
from restune_diffusion.storage.tuner_file import load_tuner, read_info
from restune_diffusion.training import StepReport, TrainConfig, ValidationConfig, train
from restune_diffusion.training.latents.batches import Batches
from restune_diffusion.training.latents.cache import build_cache
from restune_diffusion.training.losses.objective import Objective
from restune_diffusion.tuners.tuner import Tuner
from restune_diffusion.utils.errors import TrainingError

from ...tiny_training import sd_pipeline, sdxl_pipeline

MakeConfig = Callable[..., TrainConfig]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_tuner(path).state_dict()


def assert_same(one: Path, other: Path) -> None:
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@torch.no_grad()
def mean_loss(pipeline: Any, images: Path, tuner: Tuner) -> float:
    """Loss of a tuner on noise that training did not sample."""
    cache = build_cache(pipeline, load_samples(find_examples(images), 16))
    objective = Objective(pipeline.scheduler)
    batches = Batches(
        cache,
        seed=999,
        size=32,
        timesteps=objective.timesteps,
        caption_dropout=0,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    losses = []
    with attach(pipeline.unet, tuner):
        for number in range(4):
            batch = batches[number]
            noisy = objective.add_noise(batch.latents, batch.noise, batch.timesteps)
            prediction = pipeline.unet(noisy, batch.timesteps, **batch.inputs).sample
            target = objective.target(batch.latents, batch.noise, batch.timesteps)
            losses.append(objective.loss(prediction, target, batch.timesteps).item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("tuner", "prediction_type"), [("skip", "epsilon"), ("skip", "v_prediction"), ("bypass", "epsilon")]
)
def test_training_lowers_the_loss(config: MakeConfig, images: Path, tuner: str, prediction_type: str) -> None:
    pipeline = sd_pipeline(prediction_type)
    result = train(config(tuner=tuner, steps=40, batch_size=6, learning_rate=1e-2), pipeline=pipeline, verbose=False)
    fresh = Tuner.for_base(pipeline.unet, *read_info(result.path).configs)
    before = mean_loss(pipeline, images, fresh)
    after = mean_loss(pipeline, images, load_tuner(result.path))
    assert after < 0.9 * before, (before, after)


def test_sdxl_trains(config: MakeConfig, images: Path) -> None:
    pipeline = sdxl_pipeline()
    result = train(config(steps=2, batch_size=2, caption_dropout=0.5), pipeline=pipeline, verbose=False)
    assert any(value.any() for key, value in tensors(result.path).items() if "up" in key)


def test_the_base_is_left_as_it_was(config: MakeConfig) -> None:
    pipeline = sd_pipeline()
    pipeline.unet.train()
    pipeline.unet.conv_in.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in pipeline.unet.state_dict().items()}
    flags = [(parameter.requires_grad, parameter.grad) for parameter in pipeline.unet.parameters()]
    train(config(validation=ValidationConfig(prompts=("a disc",), steps=2)), pipeline=pipeline, verbose=False)
    after = pipeline.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [(parameter.requires_grad, parameter.grad) for parameter in pipeline.unet.parameters()] == flags
    assert pipeline.unet.training
    assert TunerManager.of(pipeline.unet) is None


def test_the_same_seed_gives_the_same_tuner_and_validation_changes_nothing(config: MakeConfig, tmp_path: Path) -> None:
    plain = train(config(output=tmp_path / "plain"), verbose=False)
    torch.manual_seed(123)
    torch.rand(7)  # the global random state must not matter
    validation = ValidationConfig(prompts=("a disc",), every=2, steps=2)
    watched = train(config(output=tmp_path / "watched", validation=validation), verbose=False)
    other = train(config(output=tmp_path / "other", seed=1), verbose=False)
    assert_same(plain.path, watched.path)
    assert plain.losses == watched.losses != other.losses


def test_accumulating_two_batches_of_one_equals_one_batch_of_two(config: MakeConfig, tmp_path: Path) -> None:
    settings = {"steps": 3, "caption_dropout": 0.3, "max_grad_norm": 1e9}
    whole: list[StepReport] = []
    halves: list[StepReport] = []
    one = train(config(output=tmp_path / "a", batch_size=2, **settings), on_progress=whole.append, verbose=False)
    two = train(
        config(output=tmp_path / "b", batch_size=1, gradient_accumulation_steps=2, **settings),
        on_progress=halves.append,
        verbose=False,
    )
    assert one.losses == pytest.approx(two.losses, rel=1e-4)
    # Adam hides a wrong scale of the gradient, its norm does not
    assert [report.grad_norm for report in whole] == pytest.approx([report.grad_norm for report in halves], rel=1e-3)
    first, second = tensors(one.path), tensors(two.path)
    for key in first:
        assert (first[key] - second[key]).norm() <= 1e-2 * first[key].norm(), key


def test_bf16_trains_an_fp32_tuner(config: MakeConfig) -> None:
    result = train(config(mixed_precision="bf16", steps=2), verbose=False)
    assert read_info(result.path).dtype == "F32"
    assert all(math.isfinite(loss) for loss in result.losses)


def test_fp16_on_the_cpu_is_refused_in_words(config: MakeConfig) -> None:
    with pytest.raises(TrainingError, match="fp16"):
        train(config(mixed_precision="fp16"), verbose=False)


def test_every_step_is_reported_and_logged(config: MakeConfig) -> None:
    reports: list[StepReport] = []
    settings = config(steps=3, lr_scheduler="constant_with_warmup", lr_warmup_steps=2, log_with="tensorboard")
    result = train(settings, on_progress=reports.append, verbose=False)
    lines = [json.loads(line) for line in (settings.output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [report.step for report in reports] == [1, 2, 3]
    assert tuple(line["loss"] for line in lines) == result.losses
    assert [report.learning_rate for report in reports] == pytest.approx([0, 5e-4, 1e-3])
    assert list((settings.output / "logs").rglob("events.out.tfevents*"))


def test_the_file_tells_how_it_was_trained_and_no_path(config: MakeConfig, base: Path, images: Path) -> None:
    settings = config(prompt="for all")
    info = read_info(train(settings, verbose=False).path)
    assert info.configs == settings.parts
    assert info.training["steps"] == 4
    assert info.training["images"] == 6
    assert info.training["config"]["base"] == base.name
    assert str(images.parent) not in json.dumps(info.training)
    assert str(settings.output) not in json.dumps(info.training)


def test_the_plan_says_what_will_happen(config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(config())
    shown = capsys.readouterr()
    for fact in ("6 at 16 x 16", "6 captions", "skip, ", "4 steps of 2 images = 1.3 epochs", "epsilon, fp32, cpu"):
        assert fact in shown.out
    assert "images/s" in shown.err


def test_the_plan_says_what_is_resumed(config: MakeConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    train(config(steps=1, checkpoint_every=1, resume=True))
    nothing = f"resumed     nothing: there is no checkpoint in {tmp_path / 'out'}, so training starts anew"
    assert nothing in capsys.readouterr().out
    train(config(steps=2, checkpoint_every=1, resume=True))
    assert f"resumed     from {tmp_path / 'out' / 'checkpoint-000001'}, after step 1" in capsys.readouterr().out


def test_bases_and_sizes_that_cannot_be_trained_are_refused(config: MakeConfig, base: Path) -> None:
    with pytest.raises(TrainingError, match="use a multiple of 16, for example 16"):
        train(config(resolution=20), verbose=False)
    pipeline = load_base(str(base), torch.float32)
    old = attach(pipeline.unet, Tuner.for_base(pipeline.unet, config().skip), name="old")
    with pytest.raises(TrainingError, match="has the tuners old attached; detach them"):
        train(config(), pipeline=pipeline, verbose=False)
    old.detach()
    pipeline.unet.register_to_config(in_channels=8)
    with pytest.raises(TrainingError, match="8 channels"):
        train(config(), pipeline=pipeline, verbose=False)


def test_an_output_folder_among_the_images_is_refused(config: MakeConfig, images: Path) -> None:
    with pytest.raises(TrainingError, match="inside the image folder"):
        train(config(output=images / "out"), verbose=False)


def test_settings_of_the_other_tuner_are_refused() -> None:
    with pytest.raises(ValueError, match="settings of the bypass tuner are given"):
        TrainConfig(base="b", data="d", output="o", bypass={"ratio": 0.1})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no warm-up"):
        TrainConfig(base="b", data="d", output="o", lr_warmup_steps=3)  # type: ignore[arg-type]
