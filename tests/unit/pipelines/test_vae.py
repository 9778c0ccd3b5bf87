"""A VAE that replaces that of the base: every layout gives the same weights, and what is no VAE is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

from restune_diffusion.pipelines.load_base import load_base
from restune_diffusion.utils.errors import RestuneError

from ... import tiny_training as tiny
from ...ldm_layout import vae_tensors, write_single_file
from .test_single_file import models


def _vae(channels: int = 4, levels: int = 2, **changes: Any) -> AutoencoderKL:
    torch.manual_seed(7)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(16, 32, 32, 32)[:levels],
        norm_num_groups=8,
        latent_channels=channels,
        sample_size=16,
        **changes,
    ).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a base of 4 latent channels that scales by 0.5, and one VAE in all layouts."""
    folder = tmp_path_factory.mktemp("vae")
    pipeline = tiny.sd_pipeline()
    pipeline.vae.register_to_config(scaling_factor=0.5, force_upcast=False)
    pipeline.save_pretrained(folder / "base")
    vae = _vae(scaling_factor=0.25)
    vae.save_pretrained(folder / "folder")
    tensors = load_file(folder / "folder" / "diffusion_pytorch_model.safetensors")
    save_file(tensors, folder / "diffusers.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in tensors.items():
        for new, before in old.items():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{before}.")
        renamed[name] = value
    assert renamed.keys() != tensors.keys()
    save_file(renamed, folder / "old.safetensors")
    ldm = {name: value.contiguous() for name, value in vae_tensors(vae).items()}
    save_file(ldm, folder / "prefixed.safetensors")
    save_file(
        {name.removeprefix("first_stage_model."): value for name, value in ldm.items()}, folder / "ldm.safetensors"
    )
    return folder


@pytest.mark.parametrize(
    ("name", "scaling"),
    [
        ("folder", 0.25),
        ("folder/diffusion_pytorch_model.safetensors", 0.25),
        ("diffusers.safetensors", 0.5),
        ("old.safetensors", 0.5),
        ("prefixed.safetensors", 0.5),
        ("ldm.safetensors", 0.5),
    ],
)
def test_every_layout_gives_the_same_weights_and_the_scaling_of_its_config_or_the_base(
    folder: Path, name: str, scaling: float
) -> None:
    expected = AutoencoderKL.from_pretrained(folder / "folder").state_dict()
    vae = load_base(str(folder / "base"), torch.float32, str(folder / name)).vae
    assert vae.state_dict().keys() == expected.keys()
    for key, value in vae.state_dict().items():
        assert torch.equal(value, expected[key]), key
    assert vae.config.scaling_factor == scaling
    # True is the default of the class, which a config of its own has; a file has the setting of the base.
    assert vae.config.force_upcast == (scaling == 0.25)


def test_another_scaling_than_that_of_the_base_is_warned_about(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_base(str(folder / "base"), torch.float32, str(folder / "folder"))
    assert "scales latents by 0.25, that of the base by 0.5" in caplog.text
    caplog.clear()
    load_base(str(folder / "base"), torch.float32, str(folder / "ldm.safetensors"))
    assert not caplog.text


@pytest.fixture(scope="module")
def others(folder: Path) -> Path:
    """Folder with files and folders that are no fitting autoencoder."""
    others = folder / "others"
    others.mkdir()
    save_file({"lora_unet_a.lora_down.weight": torch.zeros(1)}, others / "lora.safetensors")
    save_file({"text_model.embeddings.x": torch.zeros(1)}, others / "text.safetensors")
    save_file({"double_blocks.0.x": torch.zeros(1)}, others / "flux.safetensors")
    save_file({"encoder.layers.0.weight": torch.zeros(1)}, others / "taesd.safetensors")
    save_file({"encoder.conv_in.weight": torch.zeros(1, 3, 3, 3, 3)}, others / "video.safetensors")
    save_file({"decoder.conv_in.weight": torch.zeros(8, 4, 3, 3)}, others / "decoder.safetensors")
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, others / "sd.safetensors")
    (others / "vae.ckpt").write_bytes(b"x")
    _vae(channels=16).save_pretrained(others / "sixteen")
    _vae(levels=3).save_pretrained(others / "deeper")
    AutoencoderTiny().save_pretrained(others / "tiny")
    (others / "empty").mkdir()
    shutil.copytree(folder / "folder", others / "damaged")
    tensors = load_file(folder / "diffusers.safetensors")
    del tensors["decoder.conv_out.bias"]
    save_file(tensors, others / "damaged" / "diffusion_pytorch_model.safetensors")
    save_file(tensors, others / "incomplete.safetensors")
    return others


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.safetensors", "There is no VAE at"),
        ("lora.safetensors", "is a LoRA; give an AutoencoderKL"),
        ("text.safetensors", "is a text encoder; give an"),
        ("flux.safetensors", "is Flux; give an"),
        ("taesd.safetensors", "is a TAESD autoencoder; give an"),
        ("video.safetensors", "is an autoencoder for video; give an"),
        ("decoder.safetensors", "is incomplete: 'encoder.conv_in.weight' is missing"),
        ("sd.safetensors", "is a complete Stable Diffusion checkpoint; give an"),
        ("vae.ckpt", "is not a safetensors file; a .ckpt can run code"),
        ("sixteen", "has 16 latent channels, but the U-Net of the base has 4"),
        ("deeper", "makes images 4 times smaller, but that of the base 2 times"),
        ("tiny", "is an AutoencoderTiny; give an AutoencoderKL"),
        ("empty", "is a folder without a `config.json`; give a folder of an AutoencoderKL"),
        ("damaged", "lacks 1 weights, such as `decoder.conv_out.bias`"),
        ("incomplete.safetensors", "lacks 1 weights, such as `decoder.conv_out.bias`"),
        ("../base", "is a whole pipeline; give the folder of its VAE"),
        ("../base/unet", "is a UNet2DConditionModel; give an AutoencoderKL"),
    ],
)
def test_what_is_no_fitting_autoencoder_is_named(folder: Path, others: Path, name: str, message: str) -> None:
    with pytest.raises(RestuneError) as raised:
        load_base(str(folder / "base"), torch.float32, str(others / name))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("family", "scaling"), [("sd1", 0.18215), ("sdxl", 0.13025)])
def test_a_single_file_base_takes_another_vae_even_without_one_of_its_own(
    folder: Path, tmp_path: Path, family: str, scaling: float
) -> None:
    parts = models(family)
    path = write_single_file(tmp_path / "base.safetensors", family, parts)
    stripped = {name: value for name, value in load_file(path).items() if not name.startswith("first_stage_model.")}
    save_file(stripped, tmp_path / "without.safetensors")
    with pytest.raises(RestuneError, match="lacks its VAE; give the complete checkpoint, or a VAE with --vae"):
        load_base(str(tmp_path / "without.safetensors"), torch.float32)
    torch.manual_seed(3)
    other = AutoencoderKL.from_config({**parts["vae"].config})
    save_file({name: value.contiguous() for name, value in vae_tensors(other).items()}, tmp_path / "other.safetensors")
    for base in ("base", "without"):
        pipeline = load_base(str(tmp_path / f"{base}.safetensors"), torch.float32, str(tmp_path / "other.safetensors"))
        for key, value in other.state_dict().items():
            assert torch.equal(pipeline.vae.state_dict()[key], value), key
        assert (pipeline.vae.config.scaling_factor, pipeline.vae.config.force_upcast) == (scaling, family == "sdxl")
        assert pipeline.unet.config.sample_size == (128 if family == "sdxl" else 64)
        assert json.loads(pipeline.vae.to_json_string())["latent_channels"] == 4
