"""No command replaces a file that exists, or its own input, without being asked to."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from restune_diffusion import ResConfig, RestuneError, Tuner, load_tuner, save_tuner
from restune_diffusion.conversion import convert
from restune_diffusion.pipelines.sampling.image_names import free_path, next_number
from restune_diffusion.training import TrainConfig
from restune_diffusion.training.output_folder import check_output
from restune_diffusion.utils.errors import TrainingError

from ...conftest import make_unet, randomize

Restune = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def lora() -> Tuner:
    tuner = Tuner.for_base(make_unet(), ResConfig(self_attention="lora", feed_forward=None, width=2))
    randomize(tuner)
    return tuner


@pytest.fixture
def folder(lora: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_tuner(lora, tmp_path / "a.safetensors")
    save_tuner(lora, tmp_path / "b.safetensors")
    (tmp_path / "sub").mkdir()
    (tmp_path / "symbolic.safetensors").symlink_to("a.safetensors")
    os.link(tmp_path / "a.safetensors", tmp_path / "hard.safetensors")
    return tmp_path


SPELLINGS = (
    "a.safetensors",
    "sub/../a.safetensors",
    "symbolic.safetensors",
    "hard.safetensors",
    "{folder}/a.safetensors",
)


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)], ids=["", "overwrite"])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("command", ["merge", "convert"])
def test_an_input_is_never_the_output(
    restune: Restune, folder: Path, command: str, spelling: str, overwrite: tuple[str, ...]
) -> None:
    output, before = spelling.format(folder=folder), (folder / "a.safetensors").read_bytes()
    arguments = {
        "merge": ("b.safetensors", "a.safetensors:0.5", "--output", output),
        "convert": ("a.safetensors", output, "--to=kohya"),
    }
    code, _, errors = restune(command, *arguments[command], *overwrite)
    assert code == 1
    assert f"The output {output} is also an input" in errors
    assert (folder / "a.safetensors").read_bytes() == before
    assert (folder / "symbolic.safetensors").is_symlink()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_convert_in_python_keeps_its_input(folder: Path, spelling: str) -> None:
    with pytest.raises(RestuneError, match="is also the input"):
        convert(Path("a.safetensors"), Path(spelling.format(folder=folder)), "diffusers")
    load_tuner(folder / "a.safetensors")


def test_convert_keeps_the_files_of_its_input_folder(folder: Path) -> None:
    weights = folder / "sub" / "pytorch_lora_weights.safetensors"
    convert(folder / "a.safetensors", weights, "diffusers")
    with pytest.raises(RestuneError, match="is also the input"):
        convert(folder / "sub", weights, "restune")


COMMANDS: dict[str, tuple[tuple[str, ...], str]] = {
    "merge": (("merge", "a.safetensors", "b.safetensors", "--output", "out.safetensors"), "out.safetensors"),
    "convert": (("convert", "a.safetensors", "out.safetensors", "--to=kohya"), "out.safetensors"),
    "convert to a folder": (("convert", "a.safetensors", "out", "--to=swift"), "out/default/adapter_config.json"),
    "grid": (("grid", "--base=b", "--prompt=x", "--output=grid.png"), "grid.png"),
    "grid json": (("grid", "--base=b", "--prompt=x", "--output=grid.png", "--json"), "grid.json"),
    "evaluate": (("evaluate", "--base=b", "--tuner=t", "--data=d", "--output=out"), "out/report.json"),
    "data": (("data", "inspect", "sub", "--sheet=sheet.png"), "sheet.png"),
    "report": (("report", "sub", "--output=page.html"), "page.html"),
    "demo": (("demo", "--output=out", "--steps=1"), "out/res.safetensors"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_existing_output_is_refused_before_the_work(restune: Restune, folder: Path, name: str) -> None:
    command, existing = COMMANDS[name]
    (folder / existing).parent.mkdir(parents=True, exist_ok=True)
    (folder / existing).write_bytes(b"mine")
    code, output, errors = restune(*command)
    assert (code, output) == (1, "")
    assert "exists; choose another output, or add --overwrite to replace it." in errors
    assert errors.count("\n") == 1
    assert (folder / existing).read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["merge", "convert"])
def test_overwrite_replaces_the_output(restune: Restune, folder: Path, name: str) -> None:
    command, existing = COMMANDS[name]
    (folder / existing).write_bytes(b"old")
    code, _, errors = restune(*command, "--overwrite")
    assert code == 0, errors
    assert (folder / existing).read_bytes() != b"old"


def test_free_names_count_on(tmp_path: Path) -> None:
    assert free_path(tmp_path / "grid.png").name == "grid.png"
    for name in ("grid.png", "grid-2.png"):
        (tmp_path / name).touch()
    assert free_path(tmp_path / "grid.png").name == "grid-3.png"
    assert next_number(tmp_path) == 0
    for name in ("07-seed3.png", "123-seed1.png", "200.png", "x-seed1.png"):
        (tmp_path / name).touch()
    assert next_number(tmp_path) == 124


@pytest.mark.parametrize("resume", [False, True])
def test_training_keeps_a_finished_tuner_without_checkpoints(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "data").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "a.png")
    config = TrainConfig(base="b", data=tmp_path / "data", output=tmp_path / "out", name="ink", resume=resume)
    check_output(config)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "other.safetensors").touch()
    check_output(config)
    config.file.touch()
    with pytest.raises(TrainingError, match=r"ink\.safetensors is a finished tuner without a checkpoint"):
        check_output(config)
