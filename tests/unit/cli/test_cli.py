from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn

from restune_diffusion import (
    BypassConfig,
    RestuneStableDiffusionPipeline,
    SkipConfig,
    Tuner,
    read_info,
    save_tuner,
)
from restune_diffusion.imaging.conditions import make_condition
from restune_diffusion.pipelines.sampling.mix import unique_names
from restune_diffusion.utils.weighted_path import split_weight

Restune = Callable[..., tuple[int, str, str]]


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys\n"
        "from restune_diffusion.cli import main\n"
        "try:\n    main(['train', '--help'])\n"
        "except SystemExit:\n    sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_inspecting_a_tuner_file_imports_neither_torch_nor_diffusers(unet: nn.Module, tmp_path: Path) -> None:
    tuner = Tuner.for_base(unet, SkipConfig(ratio=0.5), BypassConfig())
    save_tuner(tuner, tmp_path / "style.safetensors")
    code = (
        "import sys\n"
        "from restune_diffusion.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as end:\n"
        "    sys.exit(end.code or 'torch' in sys.modules or 'diffusers' in sys.modules)"
    )
    for options in ((), ("--json",)):
        command = [sys.executable, "-c", code, "inspect", str(tmp_path / "style.safetensors"), *options]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        count = tuner.num_parameters()
        assert (f"{count:,} (F32)" if not options else f'"parameters": {count}') in output


@pytest.mark.parametrize("command", ["train", "generate", "grid", "evaluate", "inspect", "convert", "merge", "demo"])
def test_every_help_has_an_example(restune: Restune, command: str) -> None:
    code, output, _ = restune(command, "--help")
    assert code == 0
    assert f"Example: restune {command}" in output


def test_train_writes_the_tuner_and_prints_its_path(restune: Restune, workplace: Path, tmp_path: Path) -> None:
    code, output, errors = restune(
        "train", "--base", workplace / "base", "--data", workplace / "images", "--output", tmp_path, "--steps=2",
        "--tuner=bypass", "--bypass.ratio=0.25", "--cpu", "--validation.prompts", "a disc", "a ring",
        "--validation.steps=2",
    )  # fmt: skip
    assert code == 0, errors
    assert str(tmp_path / "tuner.safetensors") in output
    (part,) = read_info(tmp_path / "tuner.safetensors").configs
    assert part.part == "bypass"
    assert part.ratio == 0.25
    assert len(list((tmp_path / "samples" / "step-000002").glob("0*.png"))) == 2


def generate(restune: Restune, workplace: Path, output: Path, *arguments: str | Path) -> np.ndarray:
    code, printed, errors = restune(
        "generate", "--base", workplace / "base", "--prompt", "a red disc", "--steps=3", "--seed=4",
        "--output", output, "--device=cpu", *arguments,
    )  # fmt: skip
    assert code == 0, errors
    assert printed.split() == [str(output / "00-seed4.png")]
    return np.asarray(Image.open(output / "00-seed4.png")).astype(int)


def test_generate_writes_the_pipelines_images(restune: Restune, workplace: Path, tmp_path: Path) -> None:
    tuner = workplace / "trained" / "disc.safetensors"
    full = generate(restune, workplace, tmp_path / "full", "--tuner", tuner)
    none = generate(restune, workplace, tmp_path / "none", "--tuner", f"{tuner}:0")
    plain = generate(restune, workplace, tmp_path / "plain")
    mixed = generate(restune, workplace, tmp_path / "mixed", "--tuner", f"{tuner}:0.25", f"{tuner}:0.75")
    pipeline = RestuneStableDiffusionPipeline.from_pretrained(workplace / "base")
    pipeline.load_tuner_weights(tuner)
    generator = torch.Generator("cpu").manual_seed(4)
    expected = pipeline("a red disc", num_inference_steps=3, generator=generator).images[0]
    np.testing.assert_array_equal(full, np.asarray(expected))
    np.testing.assert_array_equal(none, plain)
    assert abs(full - plain).max() > 2
    # a quarter and three quarters of one tuner are the whole, up to rounding
    assert abs(full - mixed).max() <= 1


def test_generate_takes_control_images_and_makes_them(restune: Restune, workplace: Path, tmp_path: Path) -> None:
    tuner, disc = workplace / "trained" / "steered.safetensors", workplace / "images" / "red.png"
    for name in ("canny", "palette"):
        square = ImageOps.fit(Image.open(disc), (16, 16), Image.Resampling.LANCZOS)
        make_condition(name, square).save(tmp_path / f"{name}=.png")
    made = generate(
        restune, workplace, tmp_path / "made", "--tuner", tuner, "--control-from", f"canny={disc}", f"palette={disc}"
    )
    given = generate(
        restune, workplace, tmp_path / "given", "--tuner", tuner,
        "--control-image", f"canny={tmp_path / 'canny=.png'}", f"palette={tmp_path / 'palette=.png'}",
    )  # fmt: skip
    np.testing.assert_array_equal(made, given)
    none = generate(
        restune, workplace, tmp_path / "none", "--tuner", tuner, "--control-from", f"canny={disc}",
        "--control-scale=0",
    )  # fmt: skip
    assert abs(made - none).max() > 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "needs an image for 'canny' or 'palette'"),
        (
            ("--control-image", "a.png"),
            "a.png has no condition; write CONDITION=FILE. The tuners take canny, palette",
        ),
        (("--control-from", "canny=gone.png"), "gone.png cannot be read as an image"),
    ],
)
def test_generate_reports_invalid_control_images(
    restune: Restune, workplace: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, _, errors = restune(
        "generate", "--base", workplace / "base", "--prompt", "x", "--output", tmp_path, "--device=cpu",
        "--tuner", workplace / "trained" / "steered.safetensors", *arguments,
    )  # fmt: skip
    assert code == 1
    assert message in errors
    assert "Traceback" not in errors


def test_generate_writes_an_image_for_every_prompt_and_seed(restune: Restune, workplace: Path, tmp_path: Path) -> None:
    code, output, _ = restune(
        "generate", "--base", workplace / "base", "--prompt", "one", "two", "--images=2", "--steps=1", "--output",
        tmp_path, "--width=32", "--height=16", "--device=cpu",
    )  # fmt: skip
    assert code == 0
    files = [Path(line) for line in output.split()]
    assert [file.name for file in files] == ["00-seed0.png", "00-seed1.png", "01-seed0.png", "01-seed1.png"]
    assert Image.open(files[0]).size == (32, 16)
    assert len({file.read_bytes() for file in files}) == 4


def test_inspect_prints_the_header(restune: Restune, workplace: Path) -> None:
    tuner = workplace / "trained" / "disc.safetensors"
    code, text, _ = restune("inspect", tuner)
    assert code == 0
    for fact in ("19,072 (F32)", "UNet2DConditionModel", "ratio 1.0", "3 steps on 6 images of 16 px, epsilon"):
        assert fact in text
    code, output, _ = restune("inspect", tuner, "--json")
    facts = json.loads(output)
    assert code == 0
    assert facts["parameters"] == 19072
    assert facts["parts"] == [{"part": "skip", "ratio": 1.0, "sites": ["skip.*"], "grad_depth": None}]
    assert facts["training"]["config"]["learning_rate"] == 0.1


def damaged_files(workplace: Path, folder: Path) -> dict[str, Path]:
    whole = (workplace / "trained" / "disc.safetensors").read_bytes()
    contents = {
        "truncated": whole[: len(whole) // 2],
        "header": whole[:20],
        "empty": b"",
        "pickle": pickle.dumps({"weights": [1.0]}),
    }
    files = {name: folder / f"{name}.safetensors" for name in contents}
    for name, content in contents.items():
        files[name].write_bytes(content)
    torch.save({"weights": torch.zeros(2)}, folder / "zip.safetensors")
    return {**files, "zip": folder / "zip.safetensors", "gone": folder / "gone.safetensors"}


@pytest.mark.parametrize("fault", ["truncated", "header", "empty", "pickle", "zip", "gone"])
@pytest.mark.parametrize("command", ["inspect", "generate"])
def test_a_bad_tuner_file_is_refused_in_one_sentence(
    restune: Restune, workplace: Path, tmp_path: Path, fault: str, command: str
) -> None:
    file = damaged_files(workplace, tmp_path)[fault]
    arguments = ["--base", workplace / "base", "--prompt", "x", "--output", tmp_path / "images", "--tuner", file]
    code, output, errors = restune(command, *([file] if command == "inspect" else arguments))
    assert (code, output) == (1, "")
    assert errors.count("\n") == 1
    assert errors.startswith("restune: ")
    assert str(file) in errors
    assert ("pickle" in errors) == (fault in ("pickle", "zip"))
    assert not (tmp_path / "images").exists()


def test_bad_bases_and_folders_are_refused_in_one_sentence(restune: Restune, workplace: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    train = ("train", "--output", tmp_path / "out", "--cpu")
    cases = [
        ((*train, "--base", tmp_path / "gone", "--data", workplace / "images"), "There is no base at"),
        (
            (*train, "--base", tmp_path / "empty", "--data", workplace / "images"),
            "is a folder without a `model_index.json`",
        ),
        ((*train, "--base", tmp_path / "other", "--data", workplace / "images"), "is a FluxPipeline"),
        ((*train, "--base", workplace / "base", "--data", tmp_path / "empty"), "has no images"),
        ((*train, "--base", workplace / "base", "--data", tmp_path / "gone"), "does not exist"),
        (("generate", "--base", tmp_path / "gone", "--prompt", "x"), "There is no base at"),
    ]
    for arguments, message in cases:
        code, _, errors = restune(*arguments)
        assert code == 1, arguments
        assert message in errors
        assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--steps=0", "--steps 0 is not valid; use a whole number above 0."),
        ("--steps=many", "--steps many is not valid; use a whole number above 0."),
        ("--skip.ratio=-1", "--skip.ratio -1 is not valid; use a number above 0, up to 8."),
        ("--tuner=loha", "--tuner loha is not valid; use one or several of bypass, control,"),
        ("--stepps=3", "--stepps is not an option of restune train; did you mean --steps?"),
        ("--bypass.ratio=0.1", "settings of the bypass tuner are given"),
    ],
)
def test_bad_settings_are_named(restune: Restune, flag: str, message: str) -> None:
    code, _, errors = restune("train", "--base=b", "--data=d", "--output=o", flag)
    assert code == 2
    assert message in " ".join(errors.replace("│", " ").split())
    assert "Traceback" not in errors
    assert "errors.pydantic.dev" not in errors


def test_weights_are_split_from_files() -> None:
    assert split_weight("a.safetensors:0.8") == ("a.safetensors", 0.8)
    assert split_weight("a.safetensors:-1") == ("a.safetensors", -1.0)
    assert split_weight("a.safetensors") == ("a.safetensors", 1.0)
    assert split_weight("C:\\a.safetensors") == ("C:\\a.safetensors", 1.0)
    assert split_weight("C:\\a.safetensors:2") == ("C:\\a.safetensors", 2.0)


def test_tuners_of_one_name_get_distinct_names() -> None:
    assert unique_names(["x/a.safetensors", "y/a.safetensors", "a-2.safetensors", "b"]) == ["a", "a-2", "a-2-2", "b"]


def test_a_reader_that_has_enough_is_no_error() -> None:
    code = (
        "import sys\n"
        "from restune_diffusion.cli.guard import run_guarded\n"
        "sys.exit(run_guarded(lambda: print('a line\\n' * 100_000)))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "a line\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 0
