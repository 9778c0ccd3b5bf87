"""`restune generate`: sizes, numbered files, and images that record how they were generated."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from restune_diffusion import ResConfig, Tuner, save_tuner
from restune_diffusion.cli import generate as generate_module
from restune_diffusion.conversion import convert
from restune_diffusion.imaging.generation_record import a1111_text, parse_a1111, read_record
from restune_diffusion.pipelines.sampling.mix import distinct_labels

from ...conftest import randomize

Restune = Callable[..., tuple[int, str, str]]
PROMPT = 'a fox, "red": naïve 狐\nNegative space, <lora:x:1> \\ 100%'


@pytest.fixture(scope="module")
def folder(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a base, a tuner, a LoRA file of kohya and an image."""
    folder = tmp_path_factory.mktemp("generate")
    shutil.copytree(workplace / "base", folder / "base")
    shutil.copy(workplace / "trained" / "disc.safetensors", folder)
    shutil.copy(workplace / "images" / "red.png", folder)
    unet = UNet2DConditionModel.from_pretrained(workplace / "base", subfolder="unet")
    lora = Tuner.for_base(unet, ResConfig(self_attention="lora", feed_forward=None, width=2))
    randomize(lora, std=0.3)
    save_tuner(lora, folder / "ours.safetensors")
    convert(folder / "ours.safetensors", folder / "pixel.safetensors", "kohya")
    return folder


def run(restune: Restune, folder: Path, output: Path, *arguments: str | Path) -> list[Path]:
    code, printed, errors = restune(
        "generate", "--base", folder / "base", "--steps=2", "--device=cpu", "--output", output, *arguments
    )
    assert code == 0, errors
    return [Path(line) for line in printed.splitlines()]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        (("--width=32",), (32, 16)),
        (("--height=32",), (16, 32)),
        ((), (16, 16)),
        (("--width=24", "--height=40"), (24, 40)),
    ],
)
def test_each_side_is_obeyed(
    restune: Restune, folder: Path, tmp_path: Path, arguments: tuple[str, ...], size: tuple[int, int]
) -> None:
    (path,) = run(restune, folder, tmp_path, "--prompt", "x", *arguments)
    assert Image.open(path).size == size


@pytest.mark.parametrize("side", ["width", "height"])
def test_a_size_that_does_not_fit_names_the_multiple(
    restune: Restune, folder: Path, tmp_path: Path, side: str
) -> None:
    code, _, errors = restune(
        "generate", "--base", folder / "base", "--prompt", "x", f"--{side}=33", "--output", tmp_path / "o"
    )
    assert code == 1
    assert f"A {side} of 33 does not fit this base; use a multiple of 8, for example 32 or 40." in errors
    assert not (tmp_path / "o").exists()


def test_a_folder_is_numbered_on(restune: Restune, folder: Path, tmp_path: Path) -> None:
    first = run(restune, folder, tmp_path, "--prompt", "x", "y")
    before = [path.read_bytes() for path in first]
    second = run(restune, folder, tmp_path, "--prompt", "z", "--images=2")
    assert [path.name for path in [*first, *second]] == [
        "00-seed0.png", "01-seed0.png", "02-seed0.png", "02-seed1.png",
    ]  # fmt: skip
    assert [path.read_bytes() for path in first] == before
    (again,) = run(restune, folder, tmp_path, "--prompt", "z", "--overwrite")
    assert again == first[0]
    assert again.read_bytes() != before[0]


CASES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "tuner and lora": ("--tuner", "{folder}/disc.safetensors:0.6", "--lora", "{folder}/pixel.safetensors:0.7",
                       "--tuner-schedule", "disc: 0-0.5: 1", "--scheduler=dpmpp_2m_karras", "--width=24"),
    "image": ("--init-image", "{folder}/red.png", "--strength=0.9", "--scheduler=euler_a", "--dtype=fp32"),
    "text": ("--clip-skip=2", "--guidance-rescale=0.7", "--guidance=3", "--scheduler=ddim"),
    "mask": ("--tuner", "{folder}/disc.safetensors", "--tuner-mask", "{folder}/red.png"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_record_reproduces_its_image(
    restune: Restune, folder: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [argument.format(folder=folder) for argument in CASES[case]]
    paths = run(
        restune, folder, tmp_path / "first", "--prompt", "x", PROMPT, "--negative-prompt", "bad: a, b\nc",
        "--images=2", "--seed=3", *arguments,
    )  # fmt: skip
    assert len({path.read_bytes() for path in paths}) == 4
    facts = read_record(paths[3]).facts
    assert (facts["prompt"], facts["seed"]) == (PROMPT, 4)
    assert str(folder) not in json.dumps(facts)
    program, *command = shlex.split(facts["command"])
    assert program == "restune"
    monkeypatch.chdir(folder)
    code, printed, errors = restune(*command, "--output", tmp_path / "again")
    assert code == 0, errors
    np.testing.assert_array_equal(pixels(Path(printed.strip())), pixels(paths[3]))
    assert abs(pixels(paths[2]) - pixels(paths[3])).max() > 2


def test_each_option_changes_the_image(restune: Restune, folder: Path, tmp_path: Path) -> None:
    options: list[tuple[str, ...]] = [
        (), ("--scheduler=euler",), ("--clip-skip=2",), ("--guidance-rescale=0.7",),
        ("--lora", f"{folder}/pixel.safetensors"), ("--lora", f"{folder}/pixel.safetensors:0.5"),
        ("--init-image", f"{folder}/red.png"), ("--init-image", f"{folder}/red.png", "--strength=1"),
    ]  # fmt: skip
    images = [
        pixels(run(restune, folder, tmp_path, "--prompt", "a fox", "--negative-prompt=bad", *option)[0])
        for option in options
    ]
    for number, image in enumerate(images):
        for other in images[:number]:
            assert abs(image - other).max() > 0, options[number]


def test_a_lora_file_acts_as_the_tuner_it_came_from(restune: Restune, folder: Path, tmp_path: Path) -> None:
    (lora,) = run(restune, folder, tmp_path, "--prompt", "x", "--lora", folder / "pixel.safetensors:0.7")
    (ours,) = run(restune, folder, tmp_path, "--prompt", "x", "--tuner", folder / "ours.safetensors:0.7")
    assert abs(pixels(lora) - pixels(ours)).max() <= 1


def test_inspect_shows_how_an_image_was_generated(restune: Restune, folder: Path, tmp_path: Path) -> None:
    (path,) = run(
        restune, folder, tmp_path, "--prompt", PROMPT, "--tuner", folder / "disc.safetensors:0.6",
        "--lora", folder / "pixel.safetensors", "--scheduler=dpmpp_2m_karras", "--negative-prompt=bad",
    )  # fmt: skip
    code, text, _ = restune("inspect", path)
    assert code == 0
    for shown in ("naïve 狐", "disc.safetensors:0.6 (sha256", "DPMSolverMultistepScheduler", "seed", "16x16"):
        assert shown in text
    code, output, _ = restune("inspect", path, "--json")
    assert code == 0
    both = json.loads(output)
    assert both["generation"]["prompt"] == both["a1111"]["prompt"] == PROMPT
    assert both["a1111"]["negative_prompt"] == "bad"
    parameters = both["a1111"]["parameters"]
    assert parameters["Sampler"] == "DPM++ 2M"
    assert parameters["Schedule type"] == "Karras"
    assert parameters["Tuners"] == "disc: 0.6, pixel: 1"
    assert [parameters[key] for key in ("Steps", "CFG scale", "Seed", "Size")] == ["2", "7.5", "0", "16x16"]
    hashes = {tuner["file"]: tuner["sha256"] for tuner in both["generation"]["tuners"]}
    assert hashes.keys() == {"disc.safetensors", "pixel.safetensors"}
    assert parameters["Tuner hashes"] == f"disc: {hashes['disc.safetensors'][:10]}"
    assert parameters["Model hash"] == both["generation"]["base"]["sha256"][:10]


TEXTS: dict[str, tuple[str, str | None]] = {
    "plain": ("a fox", None),
    "both": ("a fox", "ugly, bad: hands"),
    "lines": ("a fox\nin the snow,\n(detailed:1.2)", "ugly\nbad, worse"),
    "unicode": ("naïve 狐 🦊 Łódź", "плохо"),
    "pairs in the prompt": ("Seed: 1, Steps: 2, Size: 1x1", "x"),
    "quotes": ('a "sign": \\ <lora:x:0.5>', None),
    "empty": ("", None),
}


@pytest.mark.parametrize("case", TEXTS)
def test_the_text_of_a1111_round_trips(case: str) -> None:
    prompt, negative = TEXTS[case]
    pairs = {"Steps": 20, "Sampler": "Euler a", "Model": 'my, model: "x"\n2', "Seed": 7, "Omitted": None}
    text = a1111_text(prompt, negative, pairs)
    expected = {"Steps": "20", "Sampler": "Euler a", "Model": 'my, model: "x"\n2', "Seed": "7"}
    assert parse_a1111(text) == (prompt, negative or "", expected)


def of_a1111(path: Path) -> str:
    text = (
        "portrait, 狐\nbest quality\nNegative prompt: ugly, fat\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 965400086, Size: 512x768, "
        'Model hash: 45dee52b, Lora hashes: "a: 1f, b: 2e", Version: v1.9'
    )
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-be")
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text("parameters", text)
    how: dict[str, Any] = {"pnginfo": chunks} if path.suffix == ".png" else {"exif": exif}
    Image.new("RGB", (8, 8)).save(path, **how)
    return text


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_inspect_reads_the_pictures_of_a1111(restune: Restune, tmp_path: Path, name: str) -> None:
    text = of_a1111(tmp_path / name)
    assert read_record(tmp_path / name).text == text
    code, output, errors = restune("inspect", tmp_path / name)
    assert code == 0, errors
    lines = dict(line.split(maxsplit=1) for line in output.splitlines())
    assert lines["prompt"] == "portrait, 狐\\nbest quality"
    assert lines["Seed"] == "965400086"
    assert lines["Size"] == "512x768"
    assert lines["Lora"] == "hashes      a: 1f, b: 2e"


@pytest.mark.parametrize(
    ("name", "message"), [("plain", "does not record how it"), ("cut", "cannot be read as an image")]
)
def test_inspect_names_an_image_without_a_record(restune: Restune, tmp_path: Path, name: str, message: str) -> None:
    path = tmp_path / f"{name}.png"
    Image.new("RGB", (8, 8)).save(path)
    if name == "cut":
        path.write_bytes(path.read_bytes()[:20])
    code, _, errors = restune("inspect", path)
    assert code == 1
    assert message in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scheduler=dpm++",), "The scheduler `dpm++` is unknown; use one of ddim"),
        (("--scheduler=euler_a_karras",), "`euler_a` has no karras sigmas"),
        (("--clip-skip=9",), "use a number from 1 to 2"),
        (("--strength=0.5",), "--strength needs an image"),
        (("--control-scale=0.5",), "--control-scale needs condition images"),
        (("--steps=2000",), "--steps 2000 is more than the 1000 timesteps"),
        (("--init-image", "gone.png"), "gone.png cannot be read as an image"),
        (("--init-image", "{folder}/red.png", "--guidance-rescale=0.5"), "no effect with --init-image"),
        (("--lora", "gone.safetensors"), "gone.safetensors"),
    ],
)
def test_options_that_do_not_fit_are_named(
    restune: Restune, folder: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, _, errors = restune(
        "generate", "--base", folder / "base", "--prompt", "x", "--output", tmp_path / "o", "--device=cpu",
        *(argument.format(folder=folder) for argument in arguments),
    )  # fmt: skip
    assert code == 1
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_ctrl_c_names_the_images_that_are_kept(
    restune: Restune, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(seed: int) -> torch.Generator:
        if seed == 2:
            raise KeyboardInterrupt
        return torch.Generator("cpu").manual_seed(seed)

    monkeypatch.setattr(generate_module, "generator", interrupted)
    code, printed, errors = restune(
        "generate", "--base", folder / "base", "--prompt", "x", "--images=4", "--steps=1", "--output", tmp_path,
        "--device=cpu",
    )  # fmt: skip
    assert code == 130
    assert f"restune: stopped; 2 of 4 images are written to {tmp_path}.\n" in errors
    assert "resume" not in errors
    assert sorted(tmp_path.iterdir()) == [Path(line) for line in printed.splitlines()]


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["x/a.safetensors", "y/b.safetensors"], ["a", "b"]),
        (["o/step-1/tuner.safetensors", "o/step-2/tuner.safetensors"], ["step-1/tuner", "step-2/tuner"]),
        (["o/s/tuner.safetensors", "p/s/tuner.safetensors", "c.safetensors"], ["o/s/tuner", "p/s/tuner", "c"]),
        (["a.safetensors", "a.safetensors"], ["a", "a"]),
    ],
)
def test_columns_of_files_of_one_name_are_named_apart(paths: list[str], labels: list[str]) -> None:
    assert distinct_labels(paths) == labels


def test_inspect_copes_with_a_damaged_or_incomplete_record(restune: Restune, tmp_path: Path) -> None:
    for name, text, code, shown in (
        ("damaged", "{not json", 1, "is damaged"),
        ("incomplete", '{"prompt": 5, "tuners": "x"}', 0, "prompt"),
    ):
        chunks = PngInfo()
        chunks.add_text("restune", text)
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png", pnginfo=chunks)
        found, output, errors = restune("inspect", tmp_path / f"{name}.png")
        assert (found, shown in output + errors) == (code, True)
