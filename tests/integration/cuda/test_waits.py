"""Copies and waits of one denoising step, for each form of weight, on the stand-in for CUDA."""

from __future__ import annotations

import pytest
import torch

from restune_diffusion import Tuner, TunerManager, save_tuner

from ...conftest import randomize
from .standin.tensors import on_host
from .steps import CASES, CONFIGS, MASK, STEPS, WEIGHTS, generate, small_pipeline


@pytest.fixture(scope="module")
def pipe():
    return small_pipeline()


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
