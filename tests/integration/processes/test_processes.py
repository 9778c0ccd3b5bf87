from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from restune_diffusion.storage.tuner_file import load_tuner
from restune_diffusion.training import TrainConfig, train

SCRIPT = Path(__file__).parents[3] / "train" / "train_style.py"


def test_two_processes_train_as_one_with_twice_the_batch(
    config: Callable[..., TrainConfig], tmp_path: Path, script: Callable[..., Any]
) -> None:
    settings = {"steps": 3, "learning_rate": 1e-3, "checkpoint_every": 2}
    one = train(config(output=tmp_path / "one", batch_size=2, **settings), verbose=False)
    shared = config(output=tmp_path / "two")
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    process = script(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT, "--base", shared.base,
        "--data", shared.data.folder, "--output", shared.output, "--batch-size=1", "--cpu", *flags,
    )  # fmt: skip
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert output.count("3 steps of 2 images") == 1, "one process alone tells the plan, for both"
    first, second = load_tuner(one.path).state_dict(), load_tuner(shared.file).state_dict()
    for key in first:
        assert (first[key] - second[key]).norm() <= 1e-2 * first[key].norm(), key
    logs = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (tmp_path / "one", shared.output)]
    for alone, together in zip(*(map(json.loads, lines) for lines in logs), strict=True):
        bands = {key: value for key, value in alone.items() if key.startswith("loss")}
        assert {key: together.get(key) for key in bands} == pytest.approx(bands, rel=1e-3)
        assert together.keys() == alone.keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="accelerate connects the processes of GPUs by itself")
def test_processes_that_would_train_alone_are_refused(
    config: Callable[..., TrainConfig], tmp_path: Path, script: Callable[..., Any]
) -> None:
    shared = config(output=tmp_path / "two")
    process = script(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT, "--base", shared.base,
        "--data", shared.data.folder, "--output", shared.output, "--steps=1",
    )  # fmt: skip
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "The launcher started 2 processes, but accelerate connects 1 of them" in errors
    assert "on CPUs, add --cpu" in errors
    assert not shared.file.exists()


def test_the_script_runs_under_accelerate_launch(
    config: Callable[..., TrainConfig], tmp_path: Path, script: Callable[..., Any]
) -> None:
    settings = config(steps=2, checkpoint_every=0)
    here = train(settings, verbose=False)
    process = script(
        "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1", "--mixed_precision=no",
        "--dynamo_backend=no", SCRIPT, "--base", settings.base, "--data", settings.data.folder,
        "--output", tmp_path / "there", "--steps=2", "--batch-size=2", "--learning-rate=1e-3", "--checkpoint-every=0",
    )  # fmt: skip
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    there = load_tuner(tmp_path / "there" / "tuner.safetensors").state_dict()
    for key, value in load_tuner(here.path).state_dict().items():
        assert value.equal(there[key]), key
