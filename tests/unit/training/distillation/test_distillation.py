from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from restune_diffusion.conversion import convert
from restune_diffusion.hooks.attachment import attach
from restune_diffusion.hooks.manager import TunerManager
from restune_diffusion.pipelines.load_base import load_base, sampling_pipeline
from restune_diffusion.storage.tuner_file import load_tuner, read_info, save_tuner
from restune_diffusion.training import TrainConfig, read_config, sweep, train
from restune_diffusion.training.build import build_accelerator, build_training_state
from restune_diffusion.training.inputs import prepared
from restune_diffusion.training.loop import batch_loss
from restune_diffusion.training.state import TrainState
from restune_diffusion.training.trainer import acting
from restune_diffusion.tuners.configs import BypassConfig, ControlConfig, PartConfig, ResConfig, SkipConfig, TextConfig
from restune_diffusion.tuners.tuner import Tuner
from restune_diffusion.utils.errors import BaseMismatchError, RestuneError, TrainingError, TunerFileError
from restune_diffusion.utils.seeds import derived_seed

from ....conftest import randomize
from ....tiny_training import sd_pipeline, sdxl_pipeline

MakeConfig = Callable[..., TrainConfig]
LORA = ResConfig(self_attention="lora", cross_attention="lora", feed_forward=None, width=4)
PROMPTS = ("a red disc", "a teal disc", "a blue disc")
STUDENTS: dict[str, PartConfig] = {
    "skip": SkipConfig(ratio=0.5),
    "bypass": BypassConfig(ratio=0.25),
    "res": ResConfig(width=4),
}


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return written(tmp_path / "lora.safetensors", LORA)


@pytest.fixture
def taught(base: Path, tmp_path: Path, teacher: Path) -> MakeConfig:
    """Factory of configs of short runs without images."""

    def make(**changes: Any) -> TrainConfig:
        settings = {
            "base": str(base),
            "output": tmp_path / "out",
            "teacher": str(teacher),
            "teacher_prompts": PROMPTS,
            "teacher_latents": 5,
            "teacher_steps": 2,
            "teacher_batch_size": 2,
            "steps": 4,
            "batch_size": 2,
            "learning_rate": 1e-3,
            "checkpoint_every": 0,
            "cpu": True,
        }
        return TrainConfig(**{name: value for name, value in {**settings, **changes}.items() if value is not None})

    return make


def written(path: Path, *parts: PartConfig, pipeline: Any = None, metadata: dict[str, str] | None = None) -> Path:
    """Write a tuner with random weights."""
    tuner = Tuner.for_pipeline(pipeline or sd_pipeline(), *parts)
    randomize(tuner, std=0.2)
    save_tuner(tuner, path, metadata=metadata)
    return path


def state(path: Path) -> dict[str, torch.Tensor]:
    return load_tuner(path).state_dict()


def assert_same(one: Path, other: Path) -> None:
    first, second = state(one), state(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@contextmanager
def running(config: TrainConfig, pipeline: Any = None) -> Iterator[TrainState]:
    """Context manager with the state of a run whose student has random weights and is attached to the base."""
    accelerator = build_accelerator(config)
    with prepared(config, accelerator, pipeline) as inputs:
        run = build_training_state(config, accelerator, inputs)
        randomize(run.tuner, seed=5, std=0.05)
        with acting(run):
            yield run


def alone(unet: Any, tuner: Tuner | None, weight: float, *call: Any, **inputs: Any) -> torch.Tensor:
    """Return the prediction of a copy of the base on which a copy of the tuner is the only one."""
    with ExitStack() as stack:
        if tuner is not None:
            stack.enter_context(attach(unet, copy.deepcopy(tuner), weight=weight))
        return unet(*call, return_dict=False, **inputs)[0]


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_the_loss_is_the_squared_error_between_two_predictions_and_reaches_only_the_student(
    config: MakeConfig, teacher: Path, name: str, share: float
) -> None:
    kind = "v_prediction" if name == "res" else "epsilon"
    pipeline = sd_pipeline(kind)
    before = copy.deepcopy(pipeline.unet)
    settings = {"teacher": f"{teacher}:0.5", "teacher_loss_weight": share, "caption_dropout": 0.3}
    with running(config(tuner=name, **{name: STUDENTS[name]}, **settings), pipeline) as run:
        batch = run.batches[3]
        noisy = run.objective.add_noise(batch.latents, batch.noise, batch.timesteps)
        wanted = alone(copy.deepcopy(before), load_tuner(teacher), 0.5, noisy, batch.timesteps, **batch.inputs)
        found = alone(copy.deepcopy(before), run.tuner, 1.0, noisy, batch.timesteps, **batch.inputs)
        target = batch.noise
        if kind == "v_prediction":
            target = run.objective.noise_scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
        loss = batch_loss(run, batch)
        expected = share * (found - wanted).square().mean() + (1 - share) * (found - target).square().mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        loss.backward()
        assert run.teacher is not None
        assert all(parameter.grad is not None for parameter in run.tuner.parameters())
        assert not any(parameter.requires_grad for parameter in run.teacher.tuner.parameters())
        assert all(parameter.grad is None for parameter in run.pipeline.unet.parameters())
        assert TunerManager.of(run.pipeline.unet).weights == {"teacher": 0.0, "in training": 1.0}  # type: ignore[union-attr]
    assert TunerManager.of(pipeline.unet) is None
    assert all(torch.equal(one, two) for one, two in zip(pipeline.unet.parameters(), before.parameters(), strict=True))


def test_the_base_and_the_teacher_are_the_same_bits_after_training(taught: MakeConfig, teacher: Path) -> None:
    pipeline, bytes_ = sd_pipeline(), teacher.read_bytes()
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    train(taught(), pipeline=pipeline, verbose=False)
    after = pipeline.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert teacher.read_bytes() == bytes_
    assert TunerManager.of(pipeline.unet) is None


@pytest.mark.parametrize("name", ["skip", "bypass"])
def test_a_student_learns_without_images(taught: MakeConfig, name: str) -> None:
    result = train(taught(tuner=name, **{name: STUDENTS[name]}, steps=30, learning_rate=1e-2), verbose=False)
    first, last = sum(result.losses[:5]), sum(result.losses[-5:])
    print("RATIO", name, last / first)
    assert last < 0.9 * first
    info = read_info(result.path)
    assert info.training["images"] == 0
    digest = hashlib.sha256((result.path.parents[1] / "lora.safetensors").read_bytes()).hexdigest()
    assert info.training["teacher"] == {
        "file": "lora.safetensors", "sha256": digest, "weight": 1.0, "loss_weight": 1.0, "prompts": 3, "latents": 5
    }  # fmt: skip


def test_the_latents_are_those_that_the_base_generates_with_the_teacher(
    taught: MakeConfig, base: Path, teacher: Path
) -> None:
    with running(taught(teacher=f"{teacher}:0.5")) as run:
        latents, captions = [latent.mean for latent in run.cache.latents], run.cache.captions
    assert captions == [PROMPTS[number % 3] for number in range(5)]
    pipeline = sampling_pipeline(load_base(str(base), torch.float32))
    pipeline.load_tuner_weights(teacher, weight=0.5)
    for first in (0, 2, 4):
        numbers = range(first, min(first + 2, 5))
        seeds = [derived_seed(0, "teacher latent", number) for number in numbers]
        expected = pipeline(
            [captions[number] for number in numbers],
            num_inference_steps=2,
            guidance_scale=4.0,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
        ).images
        assert torch.equal(torch.stack(latents[first : first + 2]), expected)


def test_interrupted_and_damaged_latents_are_completed_and_others_used_again(
    taught: MakeConfig, tmp_path: Path
) -> None:
    config = taught(steps=1)
    train(config, verbose=False)
    files = sorted((tmp_path / "out" / "teacher-latents").glob("*/*.safetensors"))
    before = [file.read_bytes() for file in files]
    assert len(files) == 3
    files[0].unlink()
    files[1].write_bytes(before[1][:-4])
    files[2].touch()
    times = files[2].stat().st_mtime_ns
    train(
        taught(steps=1, output=tmp_path / "two", teacher_latents_dir=tmp_path / "out/teacher-latents"), verbose=False
    )
    assert [file.read_bytes() for file in files] == before
    assert files[2].stat().st_mtime_ns == times
    assert_same(config.file, tmp_path / "two" / "tuner.safetensors")
    with running(taught(teacher_guidance=2.0, output=tmp_path / "three")) as run:
        assert run.cache.data_hash != read_info(config.file).training["data_hash"]


def test_a_resumed_run_equals_the_uninterrupted_one_and_needs_the_same_teacher(
    taught: MakeConfig, tmp_path: Path, teacher: Path
) -> None:
    settings = {"checkpoint_every": 1, "caption_dropout": 0.3}
    whole = train(taught(output=tmp_path / "whole", **settings), verbose=False)
    halves = {"output": tmp_path / "halves", **settings}
    train(taught(steps=2, **halves), verbose=False)
    with pytest.raises(RestuneError, match="cannot be resumed with teacher"):
        train(taught(resume=True, teacher=f"{teacher}:0.5", **halves), verbose=False)
    resumed = train(taught(resume=True, **halves), verbose=False)
    assert_same(whole.path, resumed.path)
    other = train(taught(output=tmp_path / "other", seed=1, **settings), verbose=False)
    assert not torch.equal(*(next(iter(state(run.path).values())) for run in (whole, other)))


def test_a_lora_of_kohya_teaches_what_its_tuner_file_does(taught: MakeConfig, tmp_path: Path, teacher: Path) -> None:
    convert(teacher, tmp_path / "kohya.safetensors", "kohya")
    ours = train(taught(output=tmp_path / "ours"), verbose=False)
    theirs = train(taught(output=tmp_path / "theirs", teacher=str(tmp_path / "kohya.safetensors")), verbose=False)
    one, two = state(ours.path), state(theirs.path)
    assert all(torch.allclose(one[key], two[key], atol=1e-4) for key in one)


def test_the_effect_of_a_teacher_on_the_text_arrives(taught: MakeConfig, tmp_path: Path) -> None:
    text = TextConfig(tokens=("<disc>",), initializers=("red",), rank=2)
    file = written(tmp_path / "text.safetensors", LORA, text)
    prompts = ("a <disc>", "a red disc")
    with running(taught(teacher=str(file), teacher_prompts=prompts, caption_dropout=0.3)) as run:
        batch = run.batches[0]
        assert batch.teacher_inputs is not None
        noisy = run.objective.add_noise(batch.latents, batch.noise, batch.timesteps)
        pipeline = sampling_pipeline(sd_pipeline())
        pipeline.load_tuner_weights(file)
        encoded = {caption: pipeline.encode_prompt(caption, "cpu", 1, False)[0] for caption in (*prompts, "")}
        rows = batch.teacher_inputs["encoder_hidden_states"]
        assert all(any(torch.allclose(row, each[0], atol=1e-5) for each in encoded.values()) for row in rows)
        assert not torch.allclose(rows, batch.inputs["encoder_hidden_states"])
        wanted = pipeline.unet(noisy, batch.timesteps, encoder_hidden_states=rows).sample
        pipeline.unload_tuner_weights()
        found = alone(pipeline.unet, run.tuner, 1.0, noisy, batch.timesteps, **batch.inputs)
        assert batch_loss(run, batch).item() == pytest.approx((found - wanted).square().mean().item(), rel=1e-5)
    with pytest.raises(TrainingError, match="No prompt or caption contains <disc>, the placeholder token of the"):
        train(taught(teacher=str(file)), verbose=False)


def test_a_teacher_of_text_alone_needs_no_encoders_in_training(taught: MakeConfig, tmp_path: Path) -> None:
    file = written(tmp_path / "text.safetensors", TextConfig(rank=2))
    result = train(taught(teacher=str(file), drop_encoders=True), verbose=False)
    assert all(loss > 0 for loss in result.losses)


def test_trigger_words_are_carried_over(taught: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = written(tmp_path / "trigger.safetensors", LORA, metadata={"modelspec.trigger_phrase": "sks, inked"})
    info = read_info(train(taught(teacher=str(file), trigger_word="mine"), verbose=False).path)
    assert info.trigger_words == ["mine", "sks", "inked"]
    assert info.metadata["modelspec.trigger_phrase"] == "mine, sks, inked"
    assert "No prompt or caption contains sks or inked, the trigger word of the teacher" in caplog.text


def test_gradient_checkpointing_and_cached_features_change_nothing(taught: MakeConfig, tmp_path: Path) -> None:
    plain = train(taught(output=tmp_path / "plain"), verbose=False)
    checkpointed = train(taught(output=tmp_path / "checkpointed", gradient_checkpointing=True), verbose=False)
    one, two = state(plain.path), state(checkpointed.path)
    assert all(torch.allclose(one[key], two[key], atol=1e-6) for key in one)
    settings = {"tuner": "bypass", "feature_cache": 2, "feature_cache_dtype": "fp32", "steps": 3}
    config = taught(output=tmp_path / "cached", **settings)
    cached = train(config, verbose=False)
    again = train(taught(output=tmp_path / "again", **settings), verbose=False)
    assert cached.losses == again.losses
    uncached = config.model_copy(update={"output": tmp_path / "uncached"})
    with running(uncached) as run:
        run.tuner.reset_parameters(torch.Generator().manual_seed(0))
        assert batch_loss(run, run.batches[0]).item() == pytest.approx(cached.losses[0], rel=1e-4)


def test_the_tuners_of_a_sweep_equal_those_trained_alone(taught: MakeConfig, tmp_path: Path) -> None:
    swept = sweep(taught(tuner="bypass", sweep="ratio=0.25,0.5"), verbose=False)
    for row, ratio in zip(swept.rows, (0.25, 0.5), strict=True):
        own = train(taught(tuner="bypass", bypass={"ratio": ratio}, output=tmp_path / f"alone{ratio}"), verbose=False)
        assert row.file is not None
        assert_same(row.file, own.path)


def test_sdxl_and_bf16_and_validation(taught: MakeConfig, tmp_path: Path) -> None:
    sdxl_pipeline().save_pretrained(tmp_path / "xl")
    file = written(tmp_path / "xl.safetensors", LORA, pipeline=sdxl_pipeline())
    settings = {"base": str(tmp_path / "xl"), "teacher": str(file)}
    result = train(taught(output=tmp_path / "fp32", **settings), verbose=False)
    half = train(taught(output=tmp_path / "bf16", mixed_precision="bf16", **settings), verbose=False)
    assert half.losses == pytest.approx(result.losses, rel=0.2)
    assert all(value.dtype == torch.float32 for value in state(half.path).values())
    sampled = {"validation": {"prompts": ("a red disc",), "steps": 2}, "class_prompt": "a disc"}
    shown = train(taught(output=tmp_path / "shown", **sampled, **settings), verbose=False)
    assert_same(result.path, shown.path)
    assert (shown.samples[-1] / "00.png").is_file()


def test_config_yaml_repeats_the_run(taught: MakeConfig, tmp_path: Path, teacher: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red disc\n\n  a teal disc  \n")
    first = train(taught(teacher_prompts=None, prompts_file=tmp_path / "prompts.txt"), verbose=False)
    config = read_config(tmp_path / "out" / "config.yaml", output=tmp_path / "again")
    assert config.teacher.file == str(teacher.absolute())
    assert_same(first.path, train(config, verbose=False).path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": None}, "settings of a teacher are given, but no teacher; add --teacher FILE"),
        ({"teacher_prompts": None, "teacher_latents": None}, "a teacher needs prompts or images"),
        ({"prompts_file": Path("prompts.txt")}, "teacher_prompts and prompts_file are both given"),
        ({"data": Path("images")}, "data and prompts of the teacher are both given"),
        ({"teacher_loss_weight": 0.5}, "teacher_loss_weight below 1 adds the loss on images, but there are none"),
        ({"teacher_prompts": (" ",)}, "teacher_prompts has an empty prompt"),
        ({"teacher_prompts": None, "data": Path("images")}, "settings of generated latents are given, but no prompts"),
        ({"flip": True}, "flip is a setting of images, but the latents are generated from prompts"),
        ({"tuner": "control"}, "a control tuner learns from condition images, which a teacher does not have"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(
    taught: MakeConfig, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        taught(**({"data": Path("images")} if settings == {"teacher": None} else {}) | settings)


def test_teachers_that_teach_nothing_are_refused(taught: MakeConfig, tmp_path: Path, teacher: Path) -> None:
    nowhere: dict[str, Any] = {"base": "nowhere/at-all"}
    with pytest.raises(TunerFileError, match=r"There is no teacher at .*gone.safetensors; give a tuner, or a LoRA"):
        train(taught(teacher=str(tmp_path / "gone.safetensors"), **nowhere), verbose=False)
    with pytest.raises(TrainingError, match="has the weight 0; give one between -10 and 10 that is not 0"):
        train(taught(teacher=f"{teacher}:0", **nowhere), verbose=False)
    control = written(tmp_path / "control.safetensors", ControlConfig(conditions=("canny",)))
    with pytest.raises(TrainingError, match="is a control tuner, whose predictions depend on condition images"):
        train(taught(teacher=str(control), **nowhere), verbose=False)
    other = written(tmp_path / "xl.safetensors", SkipConfig(), pipeline=sdxl_pipeline())
    with pytest.raises(BaseMismatchError, match=r"xl.safetensors cannot be the teacher of this run: This tuner was"):
        train(taught(teacher=str(other)), verbose=False)
    new = Tuner.for_pipeline(sd_pipeline(), SkipConfig(ratio=0.5))
    save_tuner(new, tmp_path / "new.safetensors")
    with pytest.raises(TrainingError, match=r"new.safetensors does not change the base's predictions, so there is"):
        train(taught(teacher=str(tmp_path / "new.safetensors")), verbose=False)
