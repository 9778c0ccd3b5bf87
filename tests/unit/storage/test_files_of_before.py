"""Files that version 0.1 wrote before the package was sorted into rooms: they still load, act and resume alike."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from restune_diffusion import attach, load_tuner, read_info
from restune_diffusion.training import read_config, train
from restune_diffusion.training.callbacks.metrics_file import read_metrics

from ... import tiny_training as tiny
from ...conftest import ROOT, make_inputs, make_unet

FILES = ROOT / "tests" / "files" / "before_rooms"


@pytest.mark.parametrize("name", ["skip", "res", "bypass"])
def test_a_tuner_file_acts_as_it_did(name):
    unet = make_unet(block_out_channels=(8, 16, 16, 24), attention_head_dim=2)
    expected = load_file(FILES / "outputs.safetensors")[name]
    with torch.no_grad():
        plain = unet(*make_inputs()).sample
        with attach(unet, load_tuner(FILES / f"{name}.safetensors"), weight=0.7):
            acted = unet(*make_inputs()).sample
    torch.testing.assert_close(acted, expected, rtol=0, atol=1e-4)
    assert (acted - plain).abs().max() > 1e-3
    assert read_info(FILES / f"{name}.safetensors").training["prompt"] == f"a {name}"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the base, the images and the interrupted run."""
    tiny.sd_pipeline().save_pretrained(tmp_path / "base")
    shutil.copytree(FILES / "images", tmp_path / "data")
    shutil.copytree(FILES / "run", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_checkpoint_resumes_to_the_tuner_that_the_whole_run_gave(workplace):
    config = read_config(Path("out/config.yaml"), resume=True)
    result = train(config, verbose=False)
    assert result.steps == config.steps == 4
    finished, expected = load_file("out/tuner.safetensors"), load_file(FILES / "finished.safetensors")
    resumed_from = load_file(FILES / "run" / "checkpoint-000002" / "tuner.safetensors")
    assert finished.keys() == expected.keys() == resumed_from.keys()
    # Processors round differently, and Adam turns a gradient near zero into a whole step: so the mean counts.
    error = sum((finished[key] - expected[key]).abs().sum() for key in expected)
    learned = sum((expected[key] - resumed_from[key]).abs().sum() for key in expected)
    assert error < 1e-3 * learned


def test_a_resumed_run_continues_the_log(workplace):
    log = Path("out/metrics.jsonl")
    assert '"leak"' in log.read_text(), "the former name of drift"
    train(read_config(Path("out/config.yaml"), resume=True), verbose=False)
    series = read_metrics(log)
    assert [step for step, _ in series["loss"]] == [1, 2, 3, 4]
    drift = dict(series["drift"])
    assert list(drift) == [0, 4], "measured before by version 0.1, and after the resumed steps"
    assert drift[0] == 0.0 < drift[4]
    assert "leak" not in series
