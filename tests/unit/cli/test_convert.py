from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from restune_diffusion import ResConfig, SkipConfig, Tuner, load_tuner, read_info, save_tuner
from restune_diffusion.cli import main

from ...conftest import TINY_BASE, randomize

Restune = Callable[..., tuple[int, str, str]]


@pytest.fixture
def restune(capsys: pytest.CaptureFixture[str]) -> Restune:
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return int(exited.value.code or 0), shown.out, shown.err

    return run


def test_there_and_back_through_every_layout(restune, components, tmp_path):
    lora = ResConfig(self_attention="lora", cross_attention="lora", feed_forward=None, width=2, linears=("to_v",))
    for layout, config in {"kohya": lora, "diffusers": lora, "swift": SkipConfig(ratio=0.1)}.items():
        tuner = Tuner.for_base(components["unet"], config)
        randomize(tuner)
        save_tuner(tuner, tmp_path / "a.safetensors")
        there, back = tmp_path / f"{layout}.safetensors", tmp_path / f"back-{layout}.safetensors"
        code, out, err = restune("convert", tmp_path / "a.safetensors", there, "--to", layout)
        assert (code, out.strip()) == (0, str(there)), err
        code, _, err = restune("convert", there, back, "--to", "restune", "--base", TINY_BASE)
        assert code == 0, err
        one, two = tuner.state_dict(), load_tuner(back).state_dict()
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert read_info(back).base.name == "restune-tiny"


def test_errors_are_one_sentence(restune, components, tmp_path):
    tuner = Tuner.for_base(components["unet"], SkipConfig(ratio=0.1))
    save_tuner(tuner, tmp_path / "skip.safetensors")
    cases = [
        (tmp_path / "none.safetensors", "kohya", "There is no file or folder"),
        (tmp_path / "skip.safetensors", "kohya", "Only a tuner of lora alone"),
        (tmp_path / "lora.safetensors", "restune", "pass the checkpoint with --base"),
    ]
    save_file({"lora_unet_x.lora_down.weight": torch.ones(1, 1)}, tmp_path / "lora.safetensors")
    for source, layout, message in cases:
        code, out, err = restune("convert", source, tmp_path / "out.safetensors", "--to", layout)
        assert (code, out) == (1, "")
        assert message in err
        assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out.safetensors").exists()


def test_partial_logs_the_skipped_layers(restune, components, tmp_path, caplog):
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    width = components["unet"].mid_block.attentions[0].transformer_blocks[0].attn1.to_q.in_features
    lora = {f"{name}.lora_down.weight": torch.ones(2, width), f"{name}.lora_up.weight": torch.ones(width, 2),
            "lora_te_x.lora_down.weight": torch.ones(2, 2), "lora_te_x.lora_up.weight": torch.ones(2, 2)}  # fmt: skip
    save_file(lora, tmp_path / "in.safetensors")
    arguments = (
        "convert",
        tmp_path / "in.safetensors",
        tmp_path / "out.safetensors",
        "--to=restune",
        f"--base={TINY_BASE}",
    )
    code, _, err = restune(*arguments)
    assert code == 1
    assert "skip the others with --partial" in err
    code, _, _ = restune(*arguments, "--partial")
    assert code == 0
    assert "lora_te_x" in caplog.text
    assert len(load_file(tmp_path / "out.safetensors")) == 2
