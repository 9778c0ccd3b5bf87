from __future__ import annotations

import json

import pytest
import torch

from restune_diffusion import ResConfig, SkipConfig, Tuner, load_tuner, read_info, save_tuner
from restune_diffusion.cli import main

from ...conftest import make_unet, randomize


@pytest.fixture
def restune(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return int(exited.value.code or 0), shown.out, shown.err

    return run


@pytest.fixture
def folder(tmp_path):
    unet = make_unet()
    lora = ResConfig(self_attention="lora", feed_forward=None, width=4)
    for name, config in {"a": lora, "b": lora, "skip": SkipConfig(ratio=0.1)}.items():
        tuner = Tuner.for_base(unet, config)
        randomize(tuner, ord(name[0]))
        save_tuner(tuner, tmp_path / f"{name}.safetensors")
    return tmp_path


def test_merge_writes_the_sum_at_the_asked_rank(restune, folder):
    code, out, err = restune(
        "merge", f"{folder}/a.safetensors:2", f"{folder}/b.safetensors:-0.5", "--method=add", "--rank=3",
        "--output", folder / "c.safetensors",
    )  # fmt: skip
    assert code == 0, err
    assert "Rank 3 keeps" in out
    info = read_info(folder / "c.safetensors")
    assert info.configs[0].width == 3
    assert json.loads(info.metadata["restune.merge"])["weights"] == [2.0, -0.5]
    assert info.metadata["modelspec.merged_from"] == "a.safetensors, b.safetensors"
    (a, b, c) = (next(load_tuner(folder / f"{name}.safetensors").parts()).loras() for name in "abc")
    for site, layer in c.items():
        u, s, v = torch.linalg.svd(2 * a[site].delta() - 0.5 * b[site].delta())
        torch.testing.assert_close(layer.delta(), u[:, :3] * s[:3] @ v[:3], rtol=0, atol=1e-5)


def test_a_refusal_writes_nothing(restune, folder):
    code, out, err = restune(
        "merge", folder / "a.safetensors", folder / "skip.safetensors", "--output", folder / "d.safetensors"
    )
    assert (code, out) == (1, "")
    assert len(err.strip().splitlines()) == 1
    assert not (folder / "d.safetensors").exists()
