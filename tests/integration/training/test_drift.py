"""The drift of prompts without the subject."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from restune_diffusion import TextConfig, load_tuner
from restune_diffusion.backbones import text_encoders
from restune_diffusion.hooks.attachment import attach
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.training.losses.objective import Objective
from restune_diffusion.utils.seeds import derived_seed

from ... import tiny_training as tiny
from ...unit.training.test_train import assert_same

MakeConfig = Callable[..., TrainConfig]

TEXT = {
    "tuner": ("skip", "text"),
    "text": TextConfig(tokens=("disc",), initializers=("ball",), rank=2),
    "caption_dropout": 0.5,
}


def drifts(settings: TrainConfig) -> dict[int, float]:
    lines = map(json.loads, (settings.output / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["drift"] for line in lines if "drift" in line}


@torch.no_grad()
def drift_by_hand(settings: TrainConfig, prompt: str) -> float:
    pipeline = tiny.sd_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    latent = pipeline(
        prompt, num_inference_steps=2, guidance_scale=7.5, generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images  # fmt: skip
    generator = torch.Generator().manual_seed(derived_seed(3, "leak", 0))
    objective = Objective(pipeline.scheduler)
    points = [
        (objective.add_noise(latent, torch.randn(latent.shape, generator=generator), t), t)
        for t in torch.tensor([[62], [187], [312], [437], [562], [687], [812], [937]])
    ]

    def predictions() -> torch.Tensor:
        from restune_diffusion.pipelines.load_base import sampling_pipeline

        states = sampling_pipeline(pipeline).encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0]
        return torch.cat([pipeline.unet(noisy, t, states).sample for noisy, t in points])

    base = predictions()
    with attach(pipeline.unet, load_tuner(settings.file), text=text_encoders(pipeline)):
        tuned = predictions()
    return 100 * float((tuned - base).square().sum() / base.square().sum())


@pytest.mark.parametrize("changes", [{}, TEXT, {"tuner": "bypass", "ema_decay": 0.5}], ids=["skip", "text", "average"])
def test_drift_is_the_squared_change_of_predictions(config: MakeConfig, changes: dict[str, Any]) -> None:
    settings = config(
        class_prompt="a ball", validation={"steps": 2, "every": 2, "seed": 3}, learning_rate=1e-2, **changes
    )
    train(settings, verbose=False)
    measured = drifts(settings)
    assert list(measured) == [0, 2, 4]
    assert measured[0] == 0.0
    assert 0 < measured[2] != measured[4]
    assert measured[4] == pytest.approx(drift_by_hand(settings, "a ball"), rel=1e-3)


def test_drift_is_reported_for_the_given_prompts(
    config: MakeConfig, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    settings = config(validation={"steps": 2, "drift_prompts": ("a ball", "a cat")}, drop_encoders=True)
    plain = train(config(output=tmp_path / "plain"), verbose=False)
    assert_same(train(settings).path, plain.path)
    shown = capsys.readouterr().out
    assert "drift       0.00% at step 0 (" in shown
    assert "% at step 0 ('a ball' 0.00%, 'a cat' 0.00%)" in shown
    assert "% at step 4 ('a ball' " in shown
    assert list(drifts(settings)) == [0, 4]
    assert not drifts(config(output=tmp_path / "plain")), "no class prompt, no drift"
    none = config(class_prompt="a ball", validation={"drift_prompts": ()}, output=tmp_path / "none")
    train(none, verbose=False)
    assert not drifts(none)


def test_drift_is_measured_on_sdxl_too(config: MakeConfig) -> None:
    settings = config(class_prompt="a ball", validation={"steps": 2}, preservation="output", steps=2)
    train(settings, pipeline=tiny.sdxl_pipeline(), verbose=False)
    assert drifts(settings)[0] == 0.0 < drifts(settings)[2]
