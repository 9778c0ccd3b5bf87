from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks import backward_memory
from restune_diffusion.hooks.attachment import attach
from restune_diffusion.training import TrainConfig
from restune_diffusion.training.advice.memory_estimate import build_unet, drop_values, kept_bytes
from restune_diffusion.tuners.tuner import Tuner

STRUCTURE = {
    "sample_size": 8,
    "block_out_channels": (16, 32, 32, 32),
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}


@pytest.mark.parametrize("kind", ["skip", "bypass"])
def test_what_is_counted_without_values_is_what_is_kept_with_them(kind: str) -> None:
    config = TrainConfig(base="b", data=Path("d"), output=Path("o"), tuner=kind, batch_size=2)  # type: ignore[arg-type]
    real = UNet2DConditionModel(**STRUCTURE).eval().requires_grad_(False)
    inputs = torch.randn(2, 4, 8, 8), torch.zeros(2, dtype=torch.long), torch.randn(2, 77, 32)
    tuner = Tuner.for_base(real, *config.parts)
    with attach(real, tuner):
        frozen_and_trained = *real.parameters(), *tuner.parameters()
        parameters = {parameter.untyped_storage().data_ptr() for parameter in frozen_and_trained}
        expected = backward_memory.kept_bytes(lambda: real(*inputs).sample, parameters)
    fake, mode = build_unet(STRUCTURE, torch.float32)
    tuner = Tuner.for_base(fake, *config.parts)
    with mode:
        drop_values(tuner)
    with attach(fake, tuner), mode:
        assert kept_bytes(fake, tuner, config, 64) == expected > 10_000
