from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from restune_diffusion.storage.tuner_file import load_tuner
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.training.output_folder import latest_checkpoint, list_checkpoints
from restune_diffusion.utils.errors import TrainingError

from ...tiny_training import write_images
from ...unit.training.test_train import assert_same

MakeConfig = Callable[..., TrainConfig]
ROOT = Path(__file__).parents[3]

# A process that is killed after writing its second checkpoint, before renaming it.
DIE_BEFORE_RENAME = """
import os, pathlib, signal, sys
from restune_diffusion.training import TrainConfig, train
rename, names = pathlib.Path.rename, []
def dying_rename(self, target):
    if pathlib.Path(target).name.startswith("checkpoint-"):
        names.append(target)
        if len(names) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
pathlib.Path.rename = dying_rename
train(TrainConfig.model_validate_json(sys.argv[1]), verbose=False)
"""


def test_killed_and_resumed_training_equals_the_uninterrupted(
    config: MakeConfig, tmp_path: Path, script: Callable[..., Any]
) -> None:
    # Enough steps that the run is still in progress when a busy machine kills it.
    settings = {"steps": 48, "checkpoint_every": 4, "lr_scheduler": "cosine", "lr_warmup_steps": 5,
                "caption_dropout": 0.2, "gradient_accumulation_steps": 2, "batch_size": 1}  # fmt: skip
    killed = config(output=tmp_path / "killed", **settings)
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    process = script(
        ROOT / "train" / "train_style.py", "--base", killed.base, "--data", killed.data.folder,
        "--output", killed.output,
        "--learning-rate=1e-3", "--cpu", *flags,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while latest_checkpoint(killed.output) is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert not killed.file.exists()
    at = latest_checkpoint(killed.output)
    assert at is not None
    assert at.name < "checkpoint-000048"

    resumed = train(killed.model_copy(update={"resume": True}), verbose=False)
    assert len(resumed.losses) == 48 - int(at.name[-6:])
    whole = train(config(output=tmp_path / "whole", **settings), verbose=False)
    assert_same(resumed.path, whole.path)
    assert whole.losses[-len(resumed.losses) :] == resumed.losses
    steps = [line.split(",")[0] for line in (killed.output / "metrics.jsonl").read_text().splitlines()]
    assert steps == [line.split(",")[0] for line in (whole.path.parent / "metrics.jsonl").read_text().splitlines()]


def test_an_unfinished_checkpoint_is_ignored(config: MakeConfig, tmp_path: Path, script: Callable[..., Any]) -> None:
    killed = config(output=tmp_path / "killed", steps=6, checkpoint_every=2)
    process = script("-c", DIE_BEFORE_RENAME, killed.model_dump_json())
    _, errors = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, errors
    assert [path.name for path in list_checkpoints(killed.output)] == ["checkpoint-000002"]
    assert list(killed.output.glob(".checkpoint-000004*")), "the process was killed while it wrote checkpoint 4"
    (killed.output / ".sample-0.tmp").mkdir()
    (killed.output / ".tuner.safetensors.0.tmp").write_bytes(b"half a tuner")
    resumed = train(killed.model_copy(update={"resume": True}), verbose=False)
    assert_same(resumed.path, train(config(output=tmp_path / "whole", steps=6), verbose=False).path)
    assert not list(killed.output.glob(".*")), "temporary files are removed"


def test_the_newest_checkpoints_are_kept(config: MakeConfig) -> None:
    settings = config(steps=5, checkpoint_every=1, checkpoints_kept=2)
    train(settings, verbose=False)
    assert [path.name for path in list_checkpoints(settings.output)] == ["checkpoint-000004", "checkpoint-000005"]
    assert not list(settings.output.glob(".*"))


def test_a_run_with_a_constant_rate_can_be_extended(config: MakeConfig, tmp_path: Path) -> None:
    train(config(steps=3, checkpoint_every=2), verbose=False)
    extended = train(config(steps=6, resume=True, checkpoint_every=100), verbose=False)
    assert len(extended.losses) == 3
    assert_same(extended.path, train(config(output=tmp_path / "whole", steps=6), verbose=False).path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 2e-3}, "learning_rate = 0.002, because it was made with 0.001"),
        ({"seed": 5}, "seed = 5"),
        ({"batch_size": 1}, "batch_size = 1"),
        ({"tuner": "bypass"}, "tuner = bypass"),
        ({"skip": {"ratio": 0.5}}, r"skip\.ratio = 0\.5"),
        ({"lr_scheduler": "linear"}, "lr_scheduler = linear, because it was made with constant"),
        ({"steps": 1}, "is beyond the requested 1 steps; set steps to 2 or more"),
    ],
)
def test_resuming_with_other_settings_is_refused(config: MakeConfig, changes: dict[str, Any], message: str) -> None:
    train(config(steps=2, checkpoint_every=2), verbose=False)
    with pytest.raises(TrainingError, match=message):
        train(config(resume=True, checkpoint_every=2, **changes), verbose=False)


def test_a_run_with_a_decaying_rate_cannot_be_extended(config: MakeConfig) -> None:
    train(config(steps=2, checkpoint_every=2, lr_scheduler="cosine"), verbose=False)
    with pytest.raises(TrainingError, match="steps = 4, because it was made with 2"):
        train(config(steps=4, resume=True, lr_scheduler="cosine"), verbose=False)


def test_resuming_with_other_images_is_refused(config: MakeConfig, tmp_path: Path) -> None:
    train(config(steps=2, checkpoint_every=2), verbose=False)
    other = write_images(tmp_path / "other", ["red", "pink"])
    with pytest.raises(TrainingError, match="images and captions"):
        train(config(resume=True, data=other), verbose=False)


def test_an_earlier_run_is_not_overwritten(config: MakeConfig) -> None:
    settings = config(steps=2, checkpoint_every=2)
    before = load_tuner(train(settings, verbose=False).path).state_dict()
    with pytest.raises(TrainingError, match="holds checkpoint-000002 of an earlier run; add --resume"):
        train(settings, verbose=False)
    assert load_tuner(settings.file).state_dict().keys() == before.keys()


def test_a_damaged_checkpoint_is_refused(config: MakeConfig) -> None:
    settings = config(steps=2, checkpoint_every=2)
    train(settings, verbose=False)
    state = settings.output / "checkpoint-000002" / "optimizer.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(TrainingError, match="checkpoint-000002 is damaged"):
        train(config(resume=True), verbose=False)
