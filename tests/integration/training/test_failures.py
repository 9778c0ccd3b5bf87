from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from restune_diffusion.storage.tuner_file import load_tuner
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.training.output_folder import list_checkpoints
from restune_diffusion.utils.errors import DataError, TrainingError

from ...tiny_training import write_images

MakeConfig = Callable[..., TrainConfig]

# Maximum file size in bytes: any larger write fails as on a full disk.
SMALL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from restune_diffusion.cli import main
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
main(sys.argv[2:])
"""


def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_last_good_checkpoint(config: MakeConfig) -> None:
    settings = config(learning_rate=1e30, steps=20, checkpoint_every=1)
    with pytest.raises(TrainingError, match=r"Stopped at step \d+: the loss is not a finite") as caught:
        train(settings, verbose=False)
    kept = list_checkpoints(settings.output)
    assert kept
    assert f"the last good checkpoint is {kept[-1]}" in str(caught.value)
    tuner = load_tuner(kept[-1] / "tuner.safetensors")
    assert all(torch.isfinite(value).all() for value in tuner.state_dict().values())
    assert not settings.file.exists()


def test_divergence_without_a_checkpoint_says_so(config: MakeConfig) -> None:
    with pytest.raises(TrainingError, match=r"lower the learning rate \(now 1e\+30\); no checkpoint"):
        train(config(learning_rate=1e30, steps=20), verbose=False)


def test_an_unreadable_image_among_good_ones_is_skipped(
    config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_images(tmp_path / "data")
    (folder / "teal.png").write_bytes(b"\x89PNG no more")
    with caplog.at_level(logging.WARNING):
        result = train(config(data=folder, steps=1), verbose=False)
    assert result.path.is_file()
    assert "teal.png" in caplog.text


def test_nothing_is_made_when_the_data_is_refused(config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    settings = config(data=tmp_path / "empty")
    with pytest.raises(DataError, match="has no images"):
        train(settings, verbose=False)
    assert not settings.output.exists()


@pytest.mark.parametrize("file", ["checkpoint", "tuner"])
def test_a_full_disk_is_told_in_one_sentence_and_breaks_nothing(
    config: MakeConfig, script: Callable[..., Any], file: str
) -> None:
    settings = config(steps=2, checkpoint_every=2)
    tuner = train(settings, verbose=False).path.read_bytes()
    before = {path.name: path.read_bytes() for path in (settings.output / "checkpoint-000002").iterdir()}
    # the optimizer's state is twice the tuner
    limit = len(tuner) + 4096 if file == "checkpoint" else len(tuner) - 4096
    every = "1" if file == "checkpoint" else "0"
    process = script(
        "-c", SMALL_DISK, limit, "train", "--base", settings.base, "--data", settings.data.folder,
        "--output", settings.output, "--resume", "--cpu", "--steps=4", "--batch-size=2", "--learning-rate=1e-3",
        "--checkpoint-every", every,
    )  # fmt: skip
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors
    sentence = errors.splitlines()[-1]
    assert sentence.startswith("restune: Cannot write")
    assert "Traceback" not in errors
    assert settings.file.read_bytes() == tuner
    assert {path.name: path.read_bytes() for path in (settings.output / "checkpoint-000002").iterdir()} == before
    assert [path.name for path in list_checkpoints(settings.output)] == ["checkpoint-000002"]
    assert not list(settings.output.glob(".*")), "nothing half-written is left behind"


def test_tensorboard_that_is_not_installed_is_named_with_its_extra(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TrainingError, match=r"pip install 'restune-diffusion\[tensorboard\]'"):
        train(config(log_with="tensorboard"), verbose=False)
