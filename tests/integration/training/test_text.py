"""Training placeholder tokens and LoRA on the text encoders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.icon_style import character
from restune_diffusion import RestuneStableDiffusionPipeline, TextConfig, Tuner, load_tuner, read_info, text_encoders
from restune_diffusion.hooks.text_encoders import EncoderHooks
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.utils.errors import SettingsError, TrainingError

from ... import tiny_training as tiny
from ...conftest import TINY_BASE
from ...unit.training.test_train import assert_same

MakeConfig = Callable[..., TrainConfig]

TEXT = TextConfig(tokens=("<zorp>",), initializers=("creature",), rank=2)
SETTINGS: dict[str, Any] = {
    "tuner": ("text", "skip"),
    "text": TEXT,
    "text_learning_rate": 5e-3,
    "caption_dropout": 0.3,
}


@pytest.fixture(scope="module")
def zorps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Discs with a placeholder token in their captions."""
    folder = tiny.write_images(tmp_path_factory.mktemp("zorps") / "images", ["red", "blue", "teal"])
    rows = [{"file_name": f"{color}.png", "text": f"a {color} <zorp>"} for color in ("red", "blue", "teal")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_resumed_training_equals_the_uninterrupted(config: MakeConfig, zorps: Path, tmp_path: Path) -> None:
    common = {**SETTINGS, "data": zorps, "steps": 6, "batch_size": 1, "gradient_accumulation_steps": 2}
    part = config(output=tmp_path / "part", **{**common, "steps": 3, "checkpoint_every": 3})
    shapes = {key: value.shape for key, value in load_tuner(train(part, verbose=False).path).state_dict().items()}
    moments = load_file(tmp_path / "part" / "checkpoint-000003" / "optimizer.safetensors")
    assert {
        key.removesuffix(":exp_avg"): value.shape
        for key, value in moments.items()
        if "exp_avg" in key and not key.endswith("_sq")
    } == shapes
    resumed = train(config(output=tmp_path / "part", **common, checkpoint_every=3, resume=True), verbose=False)
    whole = train(config(output=tmp_path / "whole", **common), verbose=False)
    assert whole.losses[3:] == resumed.losses
    assert_same(resumed.path, whole.path)
    with pytest.raises(TrainingError, match=r"text_learning_rate = 0\.1, because it was made with 0\.005"):
        train(config(output=tmp_path / "part", **{**common, "text_learning_rate": 0.1}, resume=True), verbose=False)


@pytest.mark.parametrize("make", [tiny.sd_pipeline, tiny.sdxl_pipeline], ids=["sd", "sdxl"])
def test_only_the_part_learns_and_the_pipeline_is_restored(
    config: MakeConfig, zorps: Path, make: Callable[[], Any]
) -> None:
    pipeline = make()
    before = {
        name: {key: value.clone() for key, value in encoder.module.state_dict().items()}
        for name, encoder in text_encoders(pipeline).items()
    }
    vocabulary = len(pipeline.tokenizer)
    settings = config(**{**SETTINGS, "caption_dropout": 0.0}, data=zorps, steps=3)
    start = Tuner.for_pipeline(pipeline, *settings.parts, generator=torch.Generator().manual_seed(0)).state_dict()
    learned = load_tuner(train(settings, pipeline=pipeline, verbose=False).path).state_dict()
    encoders = text_encoders(pipeline)
    for name, encoder in encoders.items():
        after = encoder.module.state_dict()
        assert all(torch.equal(value, after[key]) for key, value in before[name].items())
        assert all(parameter.grad is None for parameter in encoder.module.parameters())
        assert EncoderHooks.of(encoder.module) is None
        assert not torch.equal(learned[f"text.{name}.token.0"], start[f"text.{name}.token.0"])
    unmoved = [key for key, value in learned.items() if torch.equal(value, start[key])]
    # SDXL uses the first encoder's hidden state before its last layer.
    last = [f"text.{name}.layers.1." for name in encoders if len(encoders) > 1 and name == "text_encoder"]
    assert all(key.startswith(tuple(last)) for key in unmoved) if last else not unmoved
    assert len(pipeline.tokenizer) == vocabulary


def test_captions_that_are_all_dropped_train_too(config: MakeConfig, zorps: Path) -> None:
    settings = {**SETTINGS, "tuner": "text", "caption_dropout": 1.0, "text": TEXT.model_copy(update={"rank": 0})}
    losses = train(config(**settings, data=zorps, steps=2), pipeline=tiny.sdxl_pipeline(), verbose=False).losses
    assert len(losses) == 2


def test_the_file_records_the_training_and_generates_the_samples(config: MakeConfig, zorps: Path) -> None:
    validation = {"prompts": ("a <zorp>",), "steps": 2, "every": 2}
    result = train(config(**SETTINGS, data=zorps, steps=3, validation=validation), verbose=False)
    assert len(result.samples) == 3
    info = read_info(result.path)
    assert info.training["trigger_words"] == ["<zorp>"]
    assert info.training["config"]["text_learning_rate"] == 5e-3
    assert info.training["config"]["text"]["tokens"] == ["<zorp>"]
    plain = train(config(**SETTINGS, data=zorps, steps=3, output=result.path.parent / "b"), verbose=False)
    assert_same(result.path, plain.path)


def test_learning_rates_differ(config: MakeConfig, zorps: Path) -> None:
    """Adam's first step is as large as its learning rate."""
    settings = config(**{**SETTINGS, "caption_dropout": 0.0}, data=zorps, steps=1, weight_decay=0.0)
    pipeline = tiny.sd_pipeline()
    start = Tuner.for_pipeline(pipeline, *settings.parts, generator=torch.Generator().manual_seed(0)).state_dict()
    learned = load_tuner(train(settings, pipeline=pipeline, verbose=False).path).state_dict()
    moved = {key: float((value - start[key]).abs().max()) for key, value in learned.items()}
    assert moved["text.text_encoder.token.0"] == pytest.approx(5e-3, rel=1e-2)
    assert moved["skip.skip.0.up.weight"] == pytest.approx(1e-3, rel=1e-2)


def test_what_cannot_be_is_refused(config: MakeConfig, zorps: Path) -> None:
    with pytest.raises(TrainingError, match="No caption contains the placeholder token <zorp>"):
        train(config(tuner="text", text=TEXT), verbose=False)
    with pytest.raises(SettingsError, match="a text learning rate is given, but the tuner"):
        config(text_learning_rate=1e-3)
    with pytest.raises(SettingsError, match="settings of the text tuner are given"):
        config(text=TEXT)


def test_a_new_word_learns_a_character(tmp_path: Path) -> None:
    """Folder of five images of a creature that is not in the base's training data."""
    data = tmp_path / "zorp"
    character.write_training(data)
    text = TextConfig(tokens=(character.TOKEN,), initializers=(character.CLASS_WORD,), rank=2)
    pipeline = RestuneStableDiffusionPipeline.from_pretrained(str(TINY_BASE))
    losses = {}
    for rate in (1e-12, 1e-2):
        settings = TrainConfig(
            base="restune-tiny", data=data, output=tmp_path / str(rate), tuner="text", text=text, steps=30,
            batch_size=5, text_learning_rate=rate, checkpoint_every=0, cpu=True,
        )  # fmt: skip
        losses[rate] = train(settings, pipeline=pipeline, verbose=False).losses
    assert losses[1e-12][0] == losses[1e-2][0], "the same batches"
    assert sum(losses[1e-2][-10:]) < 0.9 * sum(losses[1e-12][-10:])
