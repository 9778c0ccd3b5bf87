"""Training in bf16: autocast is for the tuner alone if the base is in half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from restune_diffusion import BypassConfig, ResConfig, Tuner, attach
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.training.feature_cache.tap_features import predict_from_features, record_features
from restune_diffusion.utils.autocast import as_input

from ... import tiny_training as tiny
from ...conftest import make_inputs, make_unet, randomize

MakeConfig = Callable[..., TrainConfig]
LORA = {"tuner": "res", "res": ResConfig(self_attention="lora", cross_attention="lora", feed_forward=None, width=2)}
ATTENTION = {"tuner": "res", "res": ResConfig(self_attention="attention", block="prefix", width=4)}

IDS = ["skip", "bypass", "lora", "attention"]


def watched(layer: Any, seen: list[tuple[bool, torch.dtype]]) -> None:
    """Record whether autocast is on, and the dtype of the output, whenever a layer runs."""
    layer.register_forward_hook(
        lambda module, args, output: seen.append((torch.is_autocast_enabled("cpu"), output.dtype))
    )


@pytest.mark.parametrize("part", [{"tuner": "skip"}, {"tuner": "bypass"}, LORA, ATTENTION], ids=IDS)
def test_autocast_is_for_the_tuner_alone(config: MakeConfig, part: dict[str, Any]) -> None:
    pipeline, base, tuner = tiny.sd_pipeline().to(torch.bfloat16), [], []
    for layer in (pipeline.unet.conv_in, pipeline.unet.conv_out):
        watched(layer, base)

    def watch(module: nn.Module, args: Any) -> None:
        tuner.append((torch.is_autocast_enabled("cpu"), next(module.parameters()).dtype))

    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: watch(module, args) if type(module).__module__.startswith("restune_diffusion") else None
    )
    try:
        train(config(**part, mixed_precision="bf16", steps=1), pipeline=pipeline, verbose=False)
    finally:
        handle.remove()
    assert set(base) == {(False, torch.bfloat16)}
    assert set(tuner) == {(True, torch.float32)}


def test_a_pipeline_in_fp32_runs_under_autocast(config: MakeConfig) -> None:
    pipeline, seen = tiny.sd_pipeline(), []
    watched(pipeline.unet.conv_in, seen)
    train(config(mixed_precision="bf16", steps=1), pipeline=pipeline, verbose=False)
    assert seen == [(True, torch.bfloat16)]


def test_recorded_features_give_the_prediction_of_the_attached_tuner() -> None:
    unet = make_unet().to(torch.bfloat16)
    tuner = Tuner.for_base(unet, BypassConfig())
    randomize(tuner)
    tuner.autocast = torch.bfloat16
    latents, timestep, text = make_inputs()
    inputs = latents.to(unet.dtype), timestep, text.to(unet.dtype)
    features = record_features(unet, tuner.bypass.taps, *inputs)
    found = predict_from_features(unet, tuner, features)
    with attach(unet, tuner):
        assert torch.equal(found, unet(*inputs).sample)
    tuner.autocast = None
    assert not torch.equal(found, predict_from_features(unet, tuner, features))


def test_an_input_is_cast_to_a_modules_dtype_except_under_autocast() -> None:
    x = torch.ones(2, dtype=torch.bfloat16)
    assert as_input(x, torch.float32).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert as_input(x, torch.float32) is x
