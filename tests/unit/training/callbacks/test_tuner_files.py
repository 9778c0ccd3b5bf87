from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from restune_diffusion.storage.tuner_file import load_tuner, read_info
from restune_diffusion.training import StepReport, TrainConfig, train
from restune_diffusion.utils.errors import TrainingError, TunerFileError

MakeConfig = Callable[..., TrainConfig]
SAVING = {"batch_size": 1, "name": "disc", "save_every": 2, "learning_rate": 1e-2}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def contents(folder: Path) -> dict[str, list[float]]:
    return {
        path.name: torch.cat([value.flatten() for value in load_tuner(path).state_dict().values()]).tolist()
        for path in folder.glob("*.safetensors")
    }


def test_each_file_is_the_finished_tuner_of_its_step(config: MakeConfig, tmp_path: Path) -> None:
    train(config(output=tmp_path / "long", steps=5, ema_decay=0.5, **SAVING), verbose=False)
    assert names(tmp_path / "long") == ["disc-000002.safetensors", "disc-000004.safetensors", "disc.safetensors"]
    short = train(config(output=tmp_path / "short", steps=2, ema_decay=0.5, **SAVING), verbose=False)
    long = contents(tmp_path / "long")
    assert names(tmp_path / "short") == ["disc.safetensors"], "the last step has the final file alone"
    assert long["disc-000002.safetensors"] == contents(tmp_path / "short")["disc.safetensors"], "with averaged weights"
    assert long["disc-000004.safetensors"] != long["disc.safetensors"]
    info, final = read_info(tmp_path / "long" / "disc-000002.safetensors"), read_info(short.path)
    assert (info.training["steps"], info.training["data_hash"]) == (2, final.training["data_hash"])
    assert info.metadata["modelspec.title"] == "disc-000002"


def test_an_interrupted_run_loses_and_duplicates_no_file(config: MakeConfig, tmp_path: Path) -> None:
    def crash(report: StepReport) -> None:
        if report.step == 5:
            raise KeyboardInterrupt

    settings = {"steps": 7, "keep_last": 2, "checkpoint_every": 3, **SAVING}
    train(config(output=tmp_path / "whole", **settings), verbose=False)
    halves = config(output=tmp_path / "halves", **settings)
    with pytest.raises(KeyboardInterrupt):
        train(halves, verbose=False, on_progress=crash)
    leftover = tmp_path / "halves" / ".disc-000006.safetensors.abc.tmp"
    leftover.write_bytes(b"half")
    (tmp_path / "halves" / "other-000001.safetensors").write_bytes(b"of somebody else")
    train(halves.model_copy(update={"resume": True}), verbose=False)
    assert not leftover.exists()
    (tmp_path / "halves" / "other-000001.safetensors").unlink()
    assert contents(tmp_path / "halves") == contents(tmp_path / "whole")
    assert names(tmp_path / "halves")[:2] == ["disc-000004.safetensors", "disc-000006.safetensors"]
    assert (tmp_path / "halves" / "metrics.jsonl").read_text().count('"loss"') == 7


def test_a_file_that_cannot_be_completed_leaves_none(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    def crash_at_second(run: Any) -> None:
        monkeypatch.setattr("restune_diffusion.utils.atomic_write.os.fsync", full)

    with pytest.raises(TunerFileError, match=r"Cannot write .*disc-000002.safetensors: No space left"):
        train(config(steps=3, **SAVING), verbose=False, on_progress=crash_at_second)
    assert names(tmp_path / "out") == []
    assert list((tmp_path / "out").glob(".*")) == []


def test_files_of_an_earlier_run_are_not_replaced(config: MakeConfig) -> None:
    train(config(steps=3, **SAVING), verbose=False)
    config(steps=3, **SAVING).file.unlink()
    with pytest.raises(TrainingError, match=r"holds disc-000002.safetensors of an earlier run"):
        train(config(steps=3, **SAVING), verbose=False)


def test_keep_last_alone_is_refused(config: MakeConfig) -> None:
    with pytest.raises(ValueError, match="keep_last limits the files of save_every, which is 0"):
        config(keep_last=2)
