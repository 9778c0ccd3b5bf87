"""Training in fp16 on the stand-in for CUDA: real values, autocast of CUDA, and GradScaler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from restune_diffusion.training import TrainConfig, train

from ...training_fixtures import base, config, images
from ...unit.training.test_train import assert_same

__all__ = ["base", "config", "images"]
MakeConfig = Callable[..., TrainConfig]


@pytest.mark.usefixtures("cuda")
def test_fp16_learns_and_resumes_exactly(config: MakeConfig, tmp_path: Path) -> None:
    common = {"mixed_precision": "fp16", "cpu": False, "batch_size": 3, "checkpoint_every": 3}
    whole = train(config(output=tmp_path / "whole", steps=6, learning_rate=1e-2, **common), verbose=False)
    idle = train(config(output=tmp_path / "idle", steps=6, learning_rate=1e-12, **common), verbose=False)
    assert sum(whole.losses[-3:]) < sum(idle.losses[-3:])
    part = config(output=tmp_path / "part", steps=3, learning_rate=1e-2, **common)
    train(part, verbose=False)
    resumed = train(part.model_copy(update={"steps": 6, "resume": True}), verbose=False)
    assert resumed.losses == whole.losses[3:]
    assert_same(whole.path, resumed.path)


def test_the_base_runs_without_autocast(config: MakeConfig, cuda: Any) -> None:
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: (
            seen.append((output.dtype, torch.is_autocast_enabled("cuda")))
            if isinstance(module, torch.nn.GroupNorm) and output.device.type == "cuda"
            else None
        )
    )
    try:
        train(config(mixed_precision="fp16", cpu=False, steps=1, drop_encoders=True), verbose=False)
    finally:
        handle.remove()
    # The VAE encodes in fp32.
    assert set(seen) == {(torch.float16, False), (torch.float32, False)}
