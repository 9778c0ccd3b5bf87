"""Training in bf16 learns, resumes exactly, and recomputes checkpointed blocks in the same precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from restune_diffusion.training import TrainConfig, train

from ...unit.training.test_precision import ATTENTION, LORA
from ...unit.training.test_train import assert_same

MakeConfig = Callable[..., TrainConfig]


@pytest.mark.parametrize("part", [{"tuner": "skip"}, LORA, ATTENTION], ids=["skip", "lora", "attention"])
def test_checkpointing_in_bf16_recomputes_the_tuner_in_the_same_precision(
    config: MakeConfig, tmp_path: Path, part: dict[str, Any]
) -> None:
    settings = {**part, "mixed_precision": "bf16", "steps": 2}
    plain = train(config(output=tmp_path / "plain", **settings), verbose=False)
    saved = train(config(output=tmp_path / "saved", gradient_checkpointing=True, **settings), verbose=False)
    assert plain.losses == saved.losses
    assert_same(plain.path, saved.path)


def test_bf16_learns_and_resumes_exactly(config: MakeConfig, tmp_path: Path) -> None:
    common = {"mixed_precision": "bf16", "batch_size": 3, "learning_rate": 1e-2, "checkpoint_every": 6}
    whole = train(config(output=tmp_path / "whole", steps=12, **common), verbose=False)
    idle = train(config(output=tmp_path / "idle", steps=12, **{**common, "learning_rate": 1e-12}), verbose=False)
    assert sum(whole.losses[-4:]) < 0.98 * sum(idle.losses[-4:])
    part = config(output=tmp_path / "part", steps=6, **common)
    train(part, verbose=False)
    resumed = train(part.model_copy(update={"steps": 12, "resume": True}), verbose=False)
    assert resumed.losses == whole.losses[6:]
    assert_same(whole.path, resumed.path)
