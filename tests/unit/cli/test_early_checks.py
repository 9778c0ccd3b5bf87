"""Arguments, files, output folder and device are checked before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from restune_diffusion.cli.options.early_checks import check_device, check_precision, check_writable, has_cuda
from restune_diffusion.utils.early_checks import folders, machine
from restune_diffusion.utils.errors import RestuneError, TrainingError

CASES = [
    ("train --base nowhere --data images --output out", "There is no base at nowhere; give a folder"),
    ("train --base lora.safetensors --data images --output out", "The base lora.safetensors is a LoRA; give a"),
    ("train --base flux.safetensors --data images --output out", "The base flux.safetensors is Flux; give a"),
    ("train --base vae.safetensors --data images --output out", "The base vae.safetensors is a VAE; give a"),
    ("train --base refiner.safetensors --data images --output out", "is the refiner of Stable Diffusion XL; give a"),
    ("train --base model.ckpt --data images --output out", "a .ckpt can run code when it is read"),
    ("train --base pixart --data images --output out", "The base pixart is a PixArtAlphaPipeline; give a Stable"),
    (
        "train --base base --vae lora.safetensors --data images --output out",
        "The VAE lora.safetensors is a LoRA; give",
    ),
    ("train --base base --data gone --output out", "The image folder gone does not exist"),
    ("train --base base --data images --output images/out", "images/out lies inside the image folder"),
    ("train --base base --data images --output file/out", "The output folder file/out cannot be created, because"),
    ("train --base base --data images --output out --cpu --mixed-precision fp16", "fp16 needs a GPU"),
    ("train --base base --data images --output out --log-with wandb", "Weights & Biases is not installed"),
    ("generate --base gone --prompt x", "There is no base at gone"),
    ("generate --base base --prompt x --tuner gone.safetensors", "There is no tuner at gone.safetensors; give a"),
    ("generate --base base --prompt x --tuner lora.safetensors", "lora.safetensors is a LoRA, not a tuner of restune"),
    ("generate --base base --prompt x --lora gone.safetensors", "There is no LoRA at gone.safetensors; give a"),
    ("generate --base base --prompt x --device mps", "No Apple GPU is available"),
    ("generate --base base --prompt x --output file/images", "The output folder file/images cannot be created"),
    ("grid --base flux.safetensors --prompt x --output sheet.png", "The base flux.safetensors is Flux"),
    ("evaluate --base base --tuner lora.safetensors --data images --output e", "is a LoRA, not a tuner"),
    ("evaluate --base base --tuner gone --data images --output e", "There is no tuner at gone"),
    ("evaluate --run gone", "There is no folder gone; give the output folder of a training run"),
    ("evaluate --run images", "images has no config.yaml; give the output folder of a training run or a sweep"),
    ("merge lora.safetensors --output m.safetensors", "lora.safetensors is a LoRA, not a tuner of restune-diffusion"),
    ("convert gone.safetensors o.safetensors --to restune", "There is no file or folder gone.safetensors"),
    ("data inspect gone", "The image folder gone does not exist"),
    ("data inspect images --base gone", "There is no base at gone"),
]
SCRIPT = """
import json, shlex, sys
from restune_diffusion.cli import main
for line in json.load(sys.stdin):
    try:
        main(shlex.split(line))
    except SystemExit as exited:
        print(exited.code, [name for name in ("torch", "diffusers", "transformers") if name in sys.modules])
"""


def test_mistakes_are_found_before_torch_is_imported(tmp_path: Path) -> None:
    tensor = np.zeros((1, 1, 1, 1), dtype=np.float32)
    for name, key in {
        "lora": "lora_unet_a.lora_down.weight",
        "flux": "double_blocks.0.x",
        "vae": "encoder.conv_in.weight",
        "refiner": "conditioner.embedders.0.model.x",
    }.items():
        save_file({key: tensor}, tmp_path / f"{name}.safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"x")
    (tmp_path / "file").touch()
    (tmp_path / "images").mkdir()
    for name, pipeline in {"base": "StableDiffusionPipeline", "pixart": "PixArtAlphaPipeline"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    lines = [line for line, _ in CASES if not (sys.platform == "darwin" and "mps" in line)]
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.splitlines() == ["1 []"] * len(lines), process.stderr
    told = dict(zip(lines, process.stderr.splitlines(), strict=True))
    for line, message in CASES:
        if line in told:
            assert message in told[line], line
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"images", "base", "pixart"}


def test_a_folder_is_tested_by_writing_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())

    def read_only(**given: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(folders.tempfile, "TemporaryDirectory", read_only)
    with pytest.raises(TrainingError, match=r"cannot be written to \(Read-only file system\); choose another"):
        check_writable(tmp_path / "a")


@pytest.mark.parametrize(
    ("build", "driver", "expected"),
    [("2.5.0+cpu", None, False), ("2.5.0", None, False), ("2.5.0+rocm6", None, True), ("2.5.0+cu121", 1, True),
     ("2.5.0", 0, False)],
)  # fmt: skip
def test_cuda_is_told_from_the_build_and_the_driver(
    monkeypatch: pytest.MonkeyPatch, build: str, driver: int | None, expected: bool
) -> None:
    class Driver:
        def __init__(self, name: str) -> None:
            if driver is None:
                raise OSError(name)

        def cuInit(self, flags: int) -> int:
            return 0

        def cuDeviceGetCount(self, count: object) -> int:
            count._obj.value = driver  # type: ignore[attr-defined]
            return 0

    monkeypatch.setattr(machine, "version", lambda name: build)
    monkeypatch.setattr(machine.ctypes, "CDLL", Driver)
    monkeypatch.setattr(machine.sys, "platform", "linux")
    assert has_cuda() == expected
    if expected:
        check_device("cuda")
        check_precision("fp16", cpu=False)
    else:
        with pytest.raises(RestuneError, match="No CUDA device is available; use --device cpu"):
            check_device("cuda")
        with pytest.raises(TrainingError, match="fp16 needs a GPU"):
            check_precision("fp16", cpu=False)
    with pytest.raises(TrainingError, match="fp16 needs a GPU"):
        check_precision("fp16", cpu=True)
