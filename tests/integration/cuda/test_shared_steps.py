"""Branches and the ComfyUI node on the stand-in: how often the host waits in a step."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from restune_diffusion import RestuneError, SkipConfig, Tuner, load_tuner

from ...conftest import ROOT, make_inputs, make_unet, randomize
from ...unit.integrations.comfy_stand_in import ModelPatcher
from .standin.tensors import on_host

CONFIG = {"model_channels": 32, "channel_mult": (1, 2, 2, 3), "num_res_blocks": [2, 2, 2, 2], "context_dim": 32}


@pytest.fixture
def comfyui(monkeypatch: pytest.MonkeyPatch) -> Any:
    paths: Any = ModuleType("folder_paths")
    paths.models_dir = "models"
    paths.add_model_folder_path = lambda name, path: None
    monkeypatch.setitem(sys.modules, "folder_paths", paths)
    monkeypatch.syspath_prepend(str(ROOT))
    import integrations.comfyui.patch as patch

    return patch


def test_branches_compare_their_rows_once(pipe: Any, files: Path, cuda: Any) -> None:
    for name in ("water", "ink"):
        pipe.load_tuner_weights(load_tuner(files / f"{name}.safetensors"), tuner_name=name)
    pipe.to("cuda")
    try:
        with cuda.phase("branches"):
            pipe.branches("sun", ["water", "ink"], 3, num_inference_steps=4, output_type="latent")
        waits = [event for event in cuda.of("branches") if event.waits]
        assert [event.place for event in waits if event.place.startswith("pipelines/branches.py:SharedRows")] == [
            "pipelines/branches.py:SharedRows.check"
        ]

        def disturb(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            return {"latents": tensors["latents"] + torch.arange(2.0, device="cuda")[:, None, None, None]}

        with pytest.raises(RestuneError, match="do not start from the same noise"):
            pipe.branches("sun", ["water", "ink"], 2, num_inference_steps=2, callback_on_step_end=disturb)
    finally:
        pipe.to("cpu")


def test_the_comfyui_node_reads_the_noise_level_once_a_step(comfyui: Any, cuda: Any) -> None:
    unet = make_unet()
    tuner = Tuner.for_base(unet, SkipConfig(ratio=0.5))
    randomize(tuner, std=0.2)
    x, time, text = make_inputs()
    model = ModelPatcher(unet, CONFIG)
    model = comfyui.apply_tuner(model, tuner, 1.0, 0.2, 0.6)
    model = comfyui.apply_tuner(model, tuner, 0.5, 0.0, 0.5)
    expected = {sigma: model.forward(x, time, text, sigma) for sigma in (9.0, 6.0, 1.0)}
    assert not torch.equal(expected[9.0], expected[6.0])
    unet.to("cuda")
    inputs = [value.to("cuda") for value in (x, time, text)]
    model.model_patches_to(torch.device("cuda"))
    for sigma, there in expected.items():
        with cuda.phase(f"sigma {sigma}"), torch.device("cuda"):
            here = model.forward(*inputs, sigma)
        assert [str(event) for event in cuda.of(f"sigma {sigma}", ours=False) if event.waits] == [
            "wait: item in ~" + str(ROOT / "integrations/comfyui/patch.py") + ":SkipPatch._noise_level"
        ]
        torch.testing.assert_close(on_host(here), there, rtol=1e-4, atol=1e-5)
