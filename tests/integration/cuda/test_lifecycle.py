"""Life of a tuner in a pipeline on the stand-in for CUDA: moving, offloading, branching, merging, saving."""

from __future__ import annotations

import pytest
import torch

from restune_diffusion import Tuner, TunerManager, load_tuner, merge_lora, save_tuner

from ...conftest import randomize
from .standin.tensors import on_host
from .steps import CONFIGS, generate, small_pipeline


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, pipe = tmp_path_factory.mktemp("tuners"), small_pipeline()
    for seed, kind in enumerate(("skip", "lora", "prefix")):
        tuner = Tuner.for_pipeline(pipe, *CONFIGS[kind])
        randomize(tuner, seed)
        save_tuner(tuner, folder / f"{kind}.safetensors")
    return folder


@pytest.fixture(scope="module")
def expected(files):
    """Latents of each tuner on the CPU."""
    latents, pipe = {}, small_pipeline()
    for path in files.iterdir():
        pipe.load_tuner_weights(path, "t")
        latents[path.stem] = generate(pipe, path.stem)
        pipe.unload_tuner_weights()
    latents["base"] = generate(pipe, "base")
    return latents


def close(actual, expected):
    torch.testing.assert_close(on_host(actual).cpu(), expected, rtol=0, atol=1e-4)


def test_a_tuner_follows_its_base_whatever_comes_first(files, expected, cuda):
    first, later = small_pipeline(), small_pipeline()
    first.load_tuner_weights(files / "skip.safetensors", "t")
    first.to("cuda")
    later.to("cuda")
    later.load_tuner_weights(files / "skip.safetensors", "t")
    for pipe in (first, later):
        close(generate(pipe, "skip"), expected["skip"])
        assert TunerManager.of(pipe.unet).tuner("t").device.type == "cuda"
    first.to("cpu")
    assert torch.equal(generate(first, "skip"), expected["skip"])
    assert TunerManager.of(first.unet).tuner("t").device.type == "cpu"
    later.set_tuner_device("t", "cpu")
    close(generate(later, "skip"), expected["skip"])
    later.unload_tuner_weights()
    close(generate(later, "base"), expected["base"])


@pytest.mark.parametrize("kind", ["skip", "lora", "prefix"])
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_tuners_act_on_an_offloaded_base(files, expected, cuda, kind, offload):
    pipe = small_pipeline()
    getattr(pipe, offload)(device="cuda")
    pipe.load_tuner_weights(files / f"{kind}.safetensors", "t")
    close(generate(pipe, kind), expected[kind])
    assert TunerManager.of(pipe.unet).tuner("t").device.type == "cuda"


def test_lora_merges_on_the_device(files, expected, cuda):
    pipe = small_pipeline()
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    pipe.to("cuda")
    merged = merge_lora(pipe.unet, load_tuner(files / "lora.safetensors"))
    close(generate(pipe, "lora"), expected["lora"])
    merged.unmerge()
    after = on_host(pipe.unet.state_dict())
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_tuner_is_saved_from_the_device(files, cuda, tmp_path):
    pipe = small_pipeline()
    pipe.to("cuda")
    pipe.load_tuner_weights(files / "skip.safetensors", "t")
    generate(pipe, "skip")
    path = pipe.save_tuner_weights(tmp_path, "t")
    saved, original = load_tuner(path).state_dict(), load_tuner(files / "skip.safetensors").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in original.items())


def test_branches_on_the_device_are_those_of_the_cpu(files, cuda):
    def branches(device):
        pipe = small_pipeline()
        pipe.to(device)
        pipe.load_tuner_weights(files / "skip.safetensors", "t")
        return pipe.branches(
            "a red apple",
            ["t", {"t": 0.5}, None],
            2,
            num_inference_steps=4,
            height=64,
            width=64,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images

    here = branches("cpu")
    close(branches("cuda"), here)
    assert not torch.equal(here[0], here[1])
