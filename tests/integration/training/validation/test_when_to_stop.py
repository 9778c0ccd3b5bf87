"""A run that overfits on purpose: the validation loss turns up, the best tuner is kept, and the run stops."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from restune_diffusion.cli.run_demo import BASE, IMAGES
from restune_diffusion.storage.tuner_file import load_tuner, read_info
from restune_diffusion.training import StepReport, TrainConfig, train


def weights(path: Path) -> torch.Tensor:
    return torch.cat([value.flatten() for value in load_tuner(path).state_dict().values()])


def curve(output: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}


def test_an_overfitting_run_keeps_the_turning_point_and_stops(tmp_path: Path) -> None:
    rows = (IMAGES / "metadata.jsonl").read_text().splitlines()[:9]
    data = tmp_path / "icons"
    data.mkdir()
    (data / "metadata.jsonl").write_text("\n".join(rows))
    for row in rows:
        shutil.copy(IMAGES / json.loads(row)["file_name"], data)

    def config(name: str) -> TrainConfig:
        # A tuner in every block and a high rate memorize five images within a few epochs.
        return TrainConfig(
            base=str(BASE), data=data, output=tmp_path / name, tuner="res", res={"width": 32}, learning_rate=1e-2,
            steps=60, batch_size=5, checkpoint_every=5, cpu=True, log_with="none", keep="best", patience=2,
            validation={"holdout": 4, "loss_every": 2},
        )  # fmt: skip

    whole = train(config("whole"), verbose=False)
    losses = curve(tmp_path / "whole")
    turn = min(losses, key=lambda step: losses[step])
    assert 4 <= turn == whole.steps - 4 < 40, "two measurements later"
    assert losses[turn] < 0.8 * losses[0], "it has learned"
    assert losses[whole.steps] > 1.01 * losses[turn], "it has turned up"
    assert whole.stopped_early is not None
    assert f"validation_loss was best at step {turn}" in whole.stopped_early
    assert whole.best is not None
    facts = read_info(whole.best).training
    assert facts is not None
    assert facts["best"] == {"measurement": "validation_loss", "step": turn, "value": losses[turn]}
    assert facts["held_out_images"] == 4

    def crash(report: StepReport) -> None:
        if report.step == turn - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config("halves"), verbose=False, on_progress=crash)
    resumed = train(config("halves").model_copy(update={"resume": True}), verbose=False)
    assert (resumed.steps, resumed.stopped_early) == (whole.steps, whole.stopped_early)
    assert curve(tmp_path / "halves") == losses
    for name in ("tuner.safetensors", "tuner.best.safetensors"):
        assert torch.equal(weights(tmp_path / "halves" / name), weights(tmp_path / "whole" / name))
        one, other = (read_info(tmp_path / folder / name) for folder in ("halves", "whole"))
        assert one.training == other.training
