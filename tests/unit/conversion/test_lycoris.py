"""LoHa, LoKr, DoRA and full differences of other programs, against those programs' own modules."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from restune_diffusion import RestuneError, Tuner, TunerFileError, attach, describe_base, load_tuner
from restune_diffusion.backbones import module_path
from restune_diffusion.conversion import convert, export_tuner, import_tuner
from restune_diffusion.conversion.products.reduction import Reduction

from ...conftest import make_inputs, make_unet

# Two levels without attention blocks of the others: fast, and every kind of linear layer occurs.
SMALL = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def small_unet() -> UNet2DConditionModel:
    return make_unet(**SMALL)


def output(unet: torch.nn.Module, tuner: Tuner | None = None) -> torch.Tensor:
    with torch.no_grad(), contextlib.nullcontext() if tuner is None else attach(unet, tuner):
        return unet(*make_inputs(batch=1)).sample


def fill(module: torch.nn.Module, names: tuple[str, ...], std: float) -> None:
    """Give the parameters of a trainer's module values as after training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in module.named_parameters():
            if any(part in name for part in names):
                value.copy_(torch.randn(value.shape, generator=generator) * std)
            elif "dora_scale" in name or "magnitude" in name:
                value.mul_(1 + 0.2 * torch.rand(value.shape, generator=generator))


def weights_of(unet: UNet2DConditionModel):
    return lambda site: unet.get_submodule(module_path(site)).weight.detach()


LYCORIS = {
    "loha": {"algo": "loha"},
    "loha of full rank": {"algo": "loha", "linear_dim": 7},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr, both decomposed": {"algo": "lokr", "factor": 8, "decompose_both": True, "linear_dim": 2},
    "lokr, matrices": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "lokr, other factor": {"algo": "lokr", "factor": -1, "unbalanced_factorization": True},
    "rslora": {"algo": "lora", "rs_lora": True},
    "full": {"algo": "full"},
    "dora": {"algo": "lora", "dora_wd": True},
    "dora by inputs": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "doha": {"algo": "loha", "dora_wd": True},
    "dokr": {"algo": "lokr", "factor": 4, "dora_wd": True},
}


@pytest.mark.parametrize("settings", LYCORIS.values(), ids=LYCORIS)
def test_a_file_of_lycoris_acts_as_in_lycoris(tmp_path, settings):
    lycoris = pytest.importorskip("lycoris")
    unet, tuned = small_unet(), small_unet()
    lycoris.LycorisNetwork.apply_preset({"target_module": ["BasicTransformerBlock"], "target_name": []})
    network = lycoris.create_lycoris(tuned, 1.0, **{"linear_dim": 3, "linear_alpha": 2.0, **settings})
    network.apply_to()
    fill(network, ("lora_", "hada_", "lokr_", "diff"), 0.2)
    state = {key: value.detach().clone().contiguous() for key, value in network.state_dict().items()}
    expected = output(tuned)
    assert (output(unet) - expected).abs().max() > 0.01
    for prefix in ("lycoris_", "lora_unet_"):
        save_file({key.replace("lycoris_", prefix): value for key, value in state.items()}, tmp_path / "in.safetensors")
        tuner = import_tuner(tmp_path / "in.safetensors", describe_base(unet), base_weights=weights_of(unet))
        torch.testing.assert_close(output(unet, tuner), expected, rtol=0, atol=1e-5)
