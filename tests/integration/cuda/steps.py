"""Pipeline, tuners, weights and conditions of the tests and the benchmark of waits."""

from __future__ import annotations

from typing import Any

import torch

from restune_diffusion import (
    BypassConfig,
    ControlConfig,
    ResConfig,
    RestuneStableDiffusionPipeline,
    SkipConfig,
    TextConfig,
    TunerWeight,
    schedule,
)
from restune_diffusion.hooks.weights import Weight
from restune_diffusion.tuners.configs import PartConfig

from ...conftest import TWO_LEVELS
from ...tiny_pipelines import sd_components, sd_unet
from .standin.log import TransferLog
from .standin.tensors import on_host

STEPS = 3
PROMPTS = ["a red apple", "a <dog> at sea"]
MASK = torch.zeros(8, 8)
MASK[:, 4:] = 1
CONFIGS: dict[str, list[PartConfig]] = {
    "skip": [SkipConfig(ratio=0.5)],
    "bypass": [BypassConfig(ratio=0.25)],
    "adapter": [ResConfig(width=4)],
    "lora": [ResConfig(self_attention="lora", cross_attention="lora", feed_forward=None, width=4)],
    "prefix": [ResConfig(self_attention="prefix", cross_attention="prompt", feed_forward=None, width=4)],
    "control": [ControlConfig(conditions=("edges",), ratio=0.5)],
    "text": [TextConfig(tokens=("<dog>",), rank=2), SkipConfig(ratio=0.25)],
}
WEIGHTS: dict[str, Weight] = {
    "scalar": 0.5,
    "by image": [1.0, 0.5],
    "by image, one off": [1.0, 0.0],
    "schedule": schedule("0-0.5: 0.3, 0.5-1: 0.2>1"),
    "schedule by image": TunerWeight((1.0, 0.5), steps=schedule("0-1: 1>0.2")),
    "by site": {"*": 0.5},
    "mask": TunerWeight(1.0, mask=MASK),
    "mask by image": TunerWeight((1.0, 0.5), mask=torch.stack([MASK, 1 - MASK])),
    "on cond": TunerWeight(1.0, on="cond"),
}
CASES = [
    *(("skip", weight) for weight in WEIGHTS),
    *((kind, "scalar") for kind in CONFIGS if kind != "skip"),
    *(("lora", weight) for weight in ("by image", "on cond", "schedule")),
    ("adapter", "mask"),
    ("control", "by image"),
]


def small_pipeline() -> RestuneStableDiffusionPipeline:
    """Return a pipeline with the smallest U-Net that has every kind of site."""
    kept = {**sd_components(), "unet": sd_unet(**TWO_LEVELS), "feature_extractor": None}
    for name in ("controlnet", "image_encoder"):
        kept.pop(name)
    pipe = RestuneStableDiffusionPipeline(**kept, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, kind: str, phases: TransferLog | None = None) -> torch.Tensor:
    """Generate latents; `phases` is the log whose phase is the number of the step."""

    def after_step(_pipe, step, _timestep, _tensors):
        if phases is not None:
            phases.current = f"step {step + 1}"
        return {}

    if phases is not None:
        phases.current = "step 0"
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    out = pipe(
        PROMPTS,
        num_inference_steps=STEPS,
        height=64,
        width=64,
        output_type="latent",
        generator=[torch.Generator().manual_seed(seed) for seed in range(2)],
        callback_on_step_end=after_step,
        **({"tuner_image": image} if kind == "control" else {}),
    ).images
    if phases is not None:
        phases.current = ""
    return on_host(out)
