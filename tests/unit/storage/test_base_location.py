"""A base or tuner that is named wrongly never causes a network call."""

from __future__ import annotations

import json

import pytest

from restune_diffusion.storage.base_files.location import is_hub_id, local_base
from restune_diffusion.storage.sources import tuner_file
from restune_diffusion.utils.errors import RestuneError

PATHS = (
    "./stable-diffusion-v1-5", "../sd", "/models/sd", "~/sd", "models/sd/unet", "sd15", "models\\sd",
    "sd/model.safetensors", "sd/model.ckpt", "here/sd", "", ".", "sd/", "C:/sd",
)  # fmt: skip


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()

    def refused(*args, **kwargs):
        raise AssertionError("a download was tried")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refused)


@pytest.mark.parametrize("text", PATHS)
def test_text_that_can_be_a_path_is_no_id_of_the_hub(text):
    assert not is_hub_id(text)


@pytest.mark.parametrize("text", ["stabilityai/sdxl", "runwayml/stable-diffusion-v1-5", "me/_tuner", "a/b.c-d"])
def test_an_id_of_the_hub_is_known(text):
    assert is_hub_id(text)
    assert local_base(text) is None


@pytest.mark.parametrize("text", [path for path in PATHS if path not in ("", ".", "~/sd")])
def test_a_missing_path_is_named(text):
    with pytest.raises(RestuneError, match="There is no base at"):
        local_base(text)
    with pytest.raises(RestuneError, match="There is no tuner file at"):
        tuner_file(text)


def test_a_folder_that_is_not_a_pipeline_is_named(tmp_path):
    cases = {
        "adapter_config.json": ("{}", "it holds a LoRA of PEFT"),
        "config.json": (json.dumps({"_class_name": "AutoencoderKL"}), "it holds AutoencoderKL"),
        "sd.safetensors": ("", "name one of its files as the base: sd.safetensors"),
        "notes.txt": ("", "give a folder in diffusers' format"),
    }
    for name, (content, what) in cases.items():
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(RestuneError, match=what):
            local_base(str(folder))


def test_a_folder_of_several_tuners_lists_them(tmp_path):
    for name in ("ink", "chalk"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    with pytest.raises(RestuneError, match=r"2 safetensors files \(chalk.safetensors, ink.safetensors\)"):
        tuner_file(tmp_path)
