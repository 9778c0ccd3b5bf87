from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from restune_diffusion.storage.tuner_file import load_tuner, read_info, save_tuner
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.tuners.configs import BypassConfig, ControlConfig, PartConfig, ResConfig, SkipConfig, TextConfig
from restune_diffusion.tuners.tuner import Tuner
from restune_diffusion.utils.errors import BaseMismatchError, RestuneError, TrainingError, TunerFileError

from ...tiny_training import sd_pipeline, sdxl_pipeline

MakeConfig = Callable[..., TrainConfig]
PARTS: dict[str, PartConfig] = {
    "skip": SkipConfig(ratio=0.5),
    "control": ControlConfig(conditions=("canny",)),
    "res": ResConfig(width=4, cross_attention="lora"),
    "bypass": BypassConfig(ratio=0.25),
    "text": TextConfig(tokens=("disc",), initializers=("red",), rank=2),
}


def written(path: Path, *parts: PartConfig, pipeline: Any = None) -> Path:
    """Write a tuner with random weights."""
    tuner = Tuner.for_pipeline(pipeline or sd_pipeline(), *parts)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.normal_(std=0.02, generator=generator)
    save_tuner(tuner, path)
    return path


def state(path: Path) -> dict[str, torch.Tensor]:
    return load_tuner(path).state_dict()


@pytest.mark.parametrize("name", PARTS)
def test_a_run_starts_from_the_weights_of_the_file(config: MakeConfig, tmp_path: Path, name: str) -> None:
    start = written(tmp_path / "start.safetensors", PARTS[name])
    # A rate this small leaves the weights where they were, unless weight decay moves them.
    settings = {"tuner": name, name: PARTS[name], "learning_rate": 1e-12, "weight_decay": 0, "steps": 1}
    result = train(config(init_tuner=start, **settings), pipeline=sd_pipeline(), verbose=False)
    before, after = state(start), state(result.path)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[key], after[key], atol=1e-9) for key in before)
    digest = hashlib.sha256(start.read_bytes()).hexdigest()
    assert read_info(result.path).training["initial_tuner"] == {"file": "start.safetensors", "sha256": digest}


def test_other_initial_words_are_no_difference(config: MakeConfig, tmp_path: Path) -> None:
    start = written(tmp_path / "start.safetensors", PARTS["text"])
    text = TextConfig(tokens=("disc",), rank=2)
    train(config(init_tuner=start, tuner="text", text=text, steps=1), verbose=False)


@pytest.mark.parametrize(
    ("parts", "settings", "message"),
    [
        (("res",), {}, r"family res, but the tuner to train is skip; add --tuner res --res.cross-attention lora"
                       r" --res.width 4\.$"),
        (("skip", "text"), {"tuner": "skip"}, r"family skip \+ text, but .* add --tuner skip text --skip.ratio 0.5"),
        (("skip",), {}, r"has skip.ratio = 0.5, but .* train has 1.0; train with .* --tuner skip --skip.ratio 0.5"),
        (("res",), {"tuner": "res", "res": {"width": 4}}, r"has res.cross_attention = lora, but .* has None"),
    ],
)  # fmt: skip
def test_another_tuner_is_refused_before_the_base_is_loaded(
    config: MakeConfig, tmp_path: Path, parts: tuple[str, ...], settings: dict[str, Any], message: str
) -> None:
    start = written(tmp_path / "start.safetensors", *(PARTS[part] for part in parts))
    with pytest.raises(TrainingError, match=message):
        train(config(init_tuner=start, base="nowhere/at-all", **settings), verbose=False)
    assert not (tmp_path / "out").exists()


def test_files_that_cannot_start_a_run_are_refused(config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(TunerFileError, match="There is no tuner file at"):
        train(config(init_tuner=tmp_path / "gone.safetensors", base="nowhere/at-all"), verbose=False)
    other = written(tmp_path / "xl.safetensors", SkipConfig(), pipeline=sdxl_pipeline())
    with pytest.raises(BaseMismatchError, match=r"xl.safetensors cannot start this run: This tuner was made for"):
        train(config(init_tuner=other), pipeline=sd_pipeline(), verbose=False)


def test_a_resumed_run_needs_no_file_and_equals_the_uninterrupted_one(config: MakeConfig, tmp_path: Path) -> None:
    start = written(tmp_path / "start.safetensors", PARTS["skip"])
    settings = {"init_tuner": start, "skip": PARTS["skip"], "checkpoint_every": 1, "batch_size": 1}
    whole = train(config(steps=2, output=tmp_path / "whole", **settings), verbose=False)
    halves = {"output": tmp_path / "halves", **settings}
    train(config(steps=1, **halves), verbose=False)
    other = written(tmp_path / "other.safetensors", PARTS["skip"])
    start.write_bytes(other.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(RestuneError, match="cannot be resumed with initial tuner"):
        train(config(steps=2, resume=True, **halves), verbose=False)
    start.unlink()
    resumed = train(config(steps=2, resume=True, **halves), verbose=False)
    one, two = state(whole.path), state(resumed.path)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert read_info(resumed.path).training["initial_tuner"] == read_info(whole.path).training["initial_tuner"]
