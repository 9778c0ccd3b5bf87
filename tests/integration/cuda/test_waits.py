"""Copies and waits of one denoising step, for each form of weight, on the stand-in for CUDA."""

from __future__ import annotations

import pytest
import torch

from restune_diffusion import Tuner, TunerCache, TunerManager, save_tuner

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


@pytest.mark.parametrize("pinned", [False, True], ids=["file", "cache"])
def test_a_swap_waits_for_nothing(pipe, files, tmp_path, cuda, pinned):
    pipe.to("cuda")
    pipe.load_tuner_weights(files / "lora.safetensors", "t")
    generate(pipe, "lora")
    tuner = TunerManager.of(pipe.unet).tuner("t").half()
    other = Tuner.for_pipeline(pipe, *CONFIGS["lora"]).to("cpu")
    randomize(other, seed=9)
    save_tuner(other, tmp_path / "other.safetensors")
    cache = TunerCache(1) if pinned else None
    if cache is not None:
        cache.get(tmp_path / "other.safetensors")
    with cuda.phase("swap"):
        pipe.load_tuner_weights(tmp_path / "other.safetensors", "t", hotswap=True, cache=cache)
    assert cuda.waits("swap") == []
    count = len(list(tuner.parameters()))
    # Parameters in pinned memory are copied as they are, the others together; the weight takes three copies.
    assert cuda.counts("swap") == {"to device, no wait": (count if pinned else 1) + 3}
    for mine, new in zip(tuner.parameters(), other.parameters(), strict=True):
        assert mine.dtype == torch.float16
        assert torch.equal(on_host(mine), new.half())
