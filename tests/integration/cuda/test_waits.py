"""Copies and waits of one denoising step, for each form of weight, on the stand-in for CUDA."""

from __future__ import annotations

import pytest
import torch

from restune_diffusion import (
    BypassConfig,
    ControlConfig,
    ResConfig,
    RestuneStableDiffusionPipeline,
    SkipConfig,
    TextConfig,
    Tuner,
    TunerManager,
    TunerWeight,
    save_tuner,
    schedule,
)

from ...conftest import randomize
from ...tiny_pipelines import sd_components, sd_unet
from .standin.tensors import on_host

STEPS = 3
# The smallest U-Net that has every kind of site.
SMALL = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
PROMPTS = ["a red apple", "a <dog> at sea"]
MASK = torch.zeros(8, 8)
MASK[:, 4:] = 1
CONFIGS = {
    "skip": [SkipConfig(ratio=0.5)],
    "bypass": [BypassConfig(ratio=0.25)],
    "adapter": [ResConfig(width=4)],
    "lora": [ResConfig(self_attention="lora", cross_attention="lora", feed_forward=None, width=4)],
    "prefix": [ResConfig(self_attention="prefix", cross_attention="prompt", feed_forward=None, width=4)],
    "control": [ControlConfig(conditions=("edges",), ratio=0.5)],
    "text": [TextConfig(tokens=("<dog>",), rank=2), SkipConfig(ratio=0.25)],
}
WEIGHTS = {
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


@pytest.fixture(scope="module")
def pipe():
    kept = {**sd_components(), "unet": sd_unet(**SMALL), "feature_extractor": None}
    for name in ("controlnet", "image_encoder"):
        kept.pop(name)
    pipe = RestuneStableDiffusionPipeline(**kept, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def files(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuners")
    for seed, (name, parts) in enumerate(CONFIGS.items()):
        tuner = Tuner.for_pipeline(pipe, *parts)
        randomize(tuner, seed)
        save_tuner(tuner, folder / f"{name}.safetensors")
    return folder


@pytest.fixture(autouse=True)
def _on_the_cpu_again(pipe, cuda):
    yield
    pipe.unload_tuner_weights()
    pipe.to("cpu")


def generate(pipe, kind, phases=None):
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


@pytest.mark.parametrize(("kind", "weight"), CASES)
def test_no_step_waits_for_a_tuner(pipe, files, cuda, kind, weight):
    pipe.load_tuner_weights(files / f"{kind}.safetensors", "t", weight=WEIGHTS[weight])
    expected = generate(pipe, kind)
    pipe.to("cuda")
    torch.testing.assert_close(generate(pipe, kind, cuda), expected, rtol=0, atol=1e-4)
    for step in range(1, STEPS):
        assert cuda.waits(f"step {step}") == []
    # A schedule by image has other factors in each step, and everything else is sent once.
    sent = sum(cuda.counts(f"step {step}").get("to device, no wait", 0) for step in range(1, STEPS))
    assert sent <= (2 * (STEPS - 1) if weight == "schedule by image" else 0)
    # The scheduler's timesteps are read once in each call.
    reads = [wait for wait in cuda.waits("step 0") if "HostTimesteps" in wait]
    assert len(reads) == ("schedule" in weight)


def test_the_weight_of_a_moved_tuner_moves_with_it(pipe, files, cuda):
    pipe.load_tuner_weights(files / "skip.safetensors", "t", weight=WEIGHTS["mask"])
    buffers = TunerManager.of(pipe.unet)._tuners["t"].weight_buffers
    names = ("values", "count", "sites", "curve", "mask")
    assert {getattr(buffers, name).device.type for name in names} == {"cpu"}
    pipe.set_tuner_device("t", "cuda")
    assert {getattr(buffers, name).device.type for name in names} == {"cuda"}
    assert on_host(buffers.mask).tolist() == MASK.tolist()
