"""Prior and output preservation against their formulas, and together with the rest of training."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from restune_diffusion import ResConfig, TextConfig, Tuner, text_encoders
from restune_diffusion.data.captions import find_examples
from restune_diffusion.data.example import Example
from restune_diffusion.data.files import list_images
from restune_diffusion.data.training_images import load_samples
from restune_diffusion.hooks.attachment import attach
from restune_diffusion.hooks.manager import TunerManager
from restune_diffusion.pipelines.load_base import sampling_pipeline
from restune_diffusion.storage.tuner_file import load_tuner
from restune_diffusion.training import StepReport, TrainConfig, train
from restune_diffusion.training.latents.batches import Batches
from restune_diffusion.training.latents.cache import build_cache
from restune_diffusion.training.latents.text_conditioning import LiveEncoder, encode_caption
from restune_diffusion.training.losses.objective import Objective
from restune_diffusion.training.losses.preservation import OutputPreservation
from restune_diffusion.training.state import ATTACHED_NAME
from restune_diffusion.utils.errors import SettingsError, TrainingError
from restune_diffusion.utils.seeds import derived_seed

from ... import tiny_training as tiny
from ...conftest import randomize
from ...unit.training.test_train import assert_same

MakeConfig = Callable[..., TrainConfig]

ROOT = Path(__file__).parents[3]
TEXT = TextConfig(tokens=("<zorp>",), initializers=("disc",), rank=2)
KINDS: dict[str, dict[str, Any]] = {
    "skip": {"tuner": "skip"},
    "res": {"tuner": "res", "res": ResConfig(self_attention="prefix", feed_forward="adapter")},
    "bypass": {"tuner": "bypass"},
    "text": {"tuner": ("text", "skip"), "text": TEXT, "prompt": "a <zorp> disc"},
}
by_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def subject_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of the subject, without captions."""
    folder = tiny.write_images(tmp_path_factory.mktemp("subject") / "subject_images", ["red", "blue", "teal"])
    (folder / "metadata.jsonl").unlink()
    return folder


@pytest.fixture(scope="module")
def class_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_images(tmp_path_factory.mktemp("class") / "images", ["green", "orange"])
    (folder / "metadata.jsonl").unlink()
    return folder


@pytest.fixture
def subject(config: MakeConfig, subject_images: Path) -> MakeConfig:
    """Makes configs of short runs on the subject; keywords override."""

    def make(**changes: Any) -> TrainConfig:
        settings = {
            "data": subject_images,
            "prompt": "sks disc",
            "class_prompt": "a disc",
            "validation": {"steps": 2},
            "batch_size": 1,
            **changes,
        }
        return config(**settings)

    return make


def test_the_loss_is_that_of_diffusers_script(subject: MakeConfig, subject_images: Path, class_images: Path) -> None:
    reports: list[StepReport] = []
    settings = subject(preservation="prior", class_data=class_images, prior_loss_weight=0.7, batch_size=2, steps=1)
    train(settings, on_progress=reports.append, verbose=False)

    pipeline = tiny.sd_pipeline()
    make_batches = partial(
        Batches, size=2, timesteps=1000, caption_dropout=0.0, device=torch.device("cpu"), dtype=torch.float32
    )
    subject_cache = build_cache(pipeline, load_samples(find_examples(subject_images, "sks disc"), 16))
    class_examples = [Example(path, "a disc") for path in list_images(class_images)]
    class_cache = build_cache(pipeline, load_samples(class_examples, 16))
    batches = make_batches(subject_cache, seed=0)[0], make_batches(class_cache, seed=derived_seed(0, "class"))[0]
    assert not torch.equal(batches[0].noise, batches[1].noise)
    # Images and class images go through the denoiser together there.
    latents, noise, timesteps = (
        torch.cat([getattr(batch, name) for batch in batches]) for name in ("latents", "noise", "timesteps")
    )
    states = torch.cat([batch.inputs["encoder_hidden_states"] for batch in batches])
    objective = Objective(pipeline.scheduler)
    noisy = objective.noise_scheduler.add_noise(latents, noise, timesteps)
    pipeline.unet.eval().requires_grad_(False)
    tuner = Tuner.for_pipeline(pipeline, *settings.parts, generator=torch.Generator().manual_seed(0))
    with attach(pipeline.unet, tuner):
        prediction = pipeline.unet(noisy, timesteps, states).sample
    prediction, prior_prediction = prediction.chunk(2)
    target, prior_target = noise.chunk(2)
    prior_loss = torch.nn.functional.mse_loss(prior_prediction, prior_target)
    loss = torch.nn.functional.mse_loss(prediction, target) + 0.7 * prior_loss
    loss.backward()

    (report,) = reports
    assert report.loss == pytest.approx(loss.item(), rel=1e-5)
    assert report.preservation_loss == pytest.approx(prior_loss.item(), rel=1e-5)
    gradient = torch.cat([parameter.grad.flatten() for parameter in tuner.parameters()])
    assert report.grad_norm == pytest.approx(gradient.norm().item(), rel=1e-4)
    (line,) = [json.loads(line) for line in (settings.output / "metrics.jsonl").read_text().splitlines()][1:-1]
    assert line["preservation_loss"] == report.preservation_loss


def test_preservation_losses_have_no_timestep_weights(subject: MakeConfig, class_images: Path, tmp_path: Path) -> None:
    reports: list[StepReport] = []
    for gamma in (None, 1e-3):
        output = tmp_path / str(gamma)
        settings = subject(
            preservation="prior", class_data=class_images, snr_gamma=gamma, prediction_type="sample", steps=1,
            output=output,
        )  # fmt: skip
        train(settings, on_progress=reports.append, verbose=False)
    assert reports[0].preservation_loss == reports[1].preservation_loss
    assert reports[1].loss - reports[1].preservation_loss < 1e-2 * (reports[0].loss - reports[0].preservation_loss)


@pytest.mark.parametrize("make", [tiny.sd_pipeline, tiny.sdxl_pipeline], ids=["sd", "sdxl"])
@by_kind
def test_output_preservation_by_hand(subject_images: Path, kind: str, make: Callable[[], Any]) -> None:
    if make is tiny.sdxl_pipeline and kind in ("res", "bypass"):
        pytest.skip("SDXL differs only in its text embeddings")
    settings = TrainConfig(base="b", data=subject_images, output=Path("o"), **KINDS[kind])
    pipeline = make()
    pipeline.unet.eval().requires_grad_(False)
    for encoder in text_encoders(pipeline).values():
        encoder.module.eval().requires_grad_(False)
    cache = build_cache(pipeline, load_samples(find_examples(subject_images, "sks disc"), 16))
    batches = Batches(
        cache, seed=0, size=2, timesteps=1000, caption_dropout=0.0, device=torch.device("cpu"), dtype=torch.float32
    )
    batch = batches[0]
    objective = Objective(pipeline.scheduler)
    tuner = Tuner.for_pipeline(pipeline, *settings.parts)
    randomize(tuner)
    base_states = encode_caption(pipeline, "a disc")
    noisy = objective.add_noise(batch.latents, batch.noise, batch.timesteps)

    def predicted(states: torch.Tensor, pooled: torch.Tensor | None) -> torch.Tensor:
        inputs: dict[str, Any] = {"encoder_hidden_states": torch.stack([states] * 2)}
        if pooled is not None:
            inputs["added_cond_kwargs"] = {
                "text_embeds": torch.stack([pooled] * 2),
                "time_ids": batch.inputs["added_cond_kwargs"]["time_ids"],
            }
        return pipeline.unet(noisy, batch.timesteps, **inputs).sample

    base = predicted(base_states.states, base_states.pooled)
    with attach(pipeline.unet, tuner, ATTACHED_NAME, text=text_encoders(pipeline)):
        sampler = sampling_pipeline(pipeline)
        encode = LiveEncoder(sampler) if kind == "text" else None
        states = base_states
        if encode is not None:
            (states,) = encode(["a disc"])
            assert not torch.allclose(states.states, base_states.states, atol=1e-3)
        expected = (predicted(states.states, states.pooled) - base).square().mean()
        run: Any = SimpleNamespace(pipeline=pipeline, objective=objective, base_precision=nullcontext)
        preservation = OutputPreservation("a disc", base_states, encode)
        loss = preservation.loss(run, batch, 0)
        manager = TunerManager.of(pipeline.unet)
        assert manager is not None
        assert manager.enabled
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-9)
        assert loss > 1e-5
        expected_gradient = torch.autograd.grad(expected, list(tuner.parameters()), allow_unused=True)
        gradient = torch.autograd.grad(loss, list(tuner.parameters()), allow_unused=True)
    for one, other in zip(gradient, expected_gradient, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-6)


@by_kind
def test_output_preservation_is_exactly_zero_at_first(subject: MakeConfig, kind: str) -> None:
    reports: list[StepReport] = []
    settings = subject(preservation="output", steps=2, batch_size=2, learning_rate=1e-2, **KINDS[kind])
    train(settings, on_progress=reports.append, verbose=False)
    assert reports[0].preservation_loss == 0.0
    assert reports[1].preservation_loss > 0.0


def drift(settings: TrainConfig) -> float:
    lines = map(json.loads, (settings.output / "metrics.jsonl").read_text().splitlines())
    return [line["drift"] for line in lines if "drift" in line][-1]


def test_a_preserved_class_stays_nearer_to_the_base(subject: MakeConfig, tmp_path: Path) -> None:
    common = {"steps": 25, "batch_size": 3, "learning_rate": 1e-2}
    free = subject(output=tmp_path / "free", **common)
    kept = subject(output=tmp_path / "kept", preservation="output", prior_loss_weight=30.0, **common)
    for settings in (free, kept):
        train(settings, verbose=False)
    assert 0 < drift(kept) < 0.5 * drift(free)


@pytest.mark.parametrize("preservation", ["prior", "output"])
@pytest.mark.parametrize("kind", ["res", "text"])
def test_resumed_training_equals_the_uninterrupted(
    subject: MakeConfig, class_images: Path, tmp_path: Path, preservation: str, kind: str
) -> None:
    common: dict[str, Any] = {
        **KINDS[kind], "preservation": preservation, "steps": 4, "gradient_accumulation_steps": 2,
        "caption_dropout": 0.3, "gradient_checkpointing": kind == "res",
    }  # fmt: skip
    if preservation == "prior":
        common["class_data"] = class_images
    train(subject(output=tmp_path / "part", **{**common, "steps": 2, "checkpoint_every": 2}), verbose=False)
    resumed = train(subject(output=tmp_path / "part", **common, checkpoint_every=2, resume=True), verbose=False)
    whole = train(subject(output=tmp_path / "whole", **{**common, "gradient_checkpointing": False}), verbose=False)
    assert whole.losses[2:] == resumed.losses
    assert_same(resumed.path, whole.path)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("part", "whole")
    ]
    assert [line["step"] for line in logs[0] if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in logs[1]] == [0, 1, 2, 3, 4, 4]
    other = {"class_prompt": "a thing"} if preservation == "output" else {"num_class_images": 1}
    with pytest.raises(TrainingError, match="cannot be resumed with"):
        train(subject(output=tmp_path / "part", **{**common, **other}, resume=True), verbose=False)


def test_two_processes_share_the_generation_and_train_as_one(
    subject: MakeConfig, tmp_path: Path, script: Callable[..., Any]
) -> None:
    one = subject(preservation="prior", num_class_images=3, batch_size=2, steps=2, output=tmp_path / "one")
    train(one, verbose=False)
    two = tmp_path / "two"
    process = script(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train" / "train_dreambooth.py",
        "--base", one.base, "--data", one.data.folder, "--output", two, "--instance_prompt", "sks disc",
        "--class_prompt", "a disc", "--with_prior_preservation", "--num_class_images=3", "--train_batch_size=1",
        "--max_train_steps=2", "--learning-rate=1e-3", "--checkpoint-every=0", "--validation.steps=2", "--cpu",
    )  # fmt: skip
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "preserved   3 class images" in output
    generated = [list_images(folder / "class-images") for folder in (one.output, two)]
    assert len(generated[0]) == 3
    assert [path.read_bytes() for path in generated[0]] == [path.read_bytes() for path in generated[1]]
    first, second = (load_tuner(folder / "tuner.safetensors").state_dict() for folder in (one.output, two))
    for key in first:
        assert (first[key] - second[key]).norm() <= 1e-2 * first[key].norm(), key
    assert drift(one) == pytest.approx(drift(subject(output=two)), rel=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preservation": "none", "num_class_images": 5}, "is set, but preservation is none"),
        ({"preservation": "none", "prior_loss_weight": 0.5}, "is set, but preservation is none"),
        ({"preservation": "output", "class_data": "c"}, "output preservation uses no class images"),
        ({"preservation": "output", "class_prompt": " "}, "give --class-prompt"),
        ({"preservation": "prior", "class_prompt": None}, "give --class-prompt"),
        ({"preservation": "prior", "tuner": "control"}, "choose output preservation"),
        (
            {"tuner": "control", "validation": {"drift_prompts": ("a disc",)}},
            "drift prompts do not support a control tuner",
        ),
        (
            {"tuner": ("skip", "text"), "text": TEXT, "class_prompt": "a <zorp>"},
            "contains a placeholder token of the subject",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    subject: MakeConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        subject(**changes)
