from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from restune_diffusion import (
    RestuneStableDiffusionPipeline,
    SkipConfig,
    TextConfig,
    Tuner,
    TunerWeight,
    save_tuner,
)
from restune_diffusion.backbones import text_encoders
from restune_diffusion.imaging.contact_sheet import _wrapped, captioned_grid, fitting_cell, labelled_grid
from restune_diffusion.imaging.generation_record import read_record

from ...conftest import randomize

Restune = Callable[..., tuple[int, str, str]]


def cells(sheet: Path, columns: int, rows: int, cell: int) -> list[list[np.ndarray]]:
    """Return the images of a sheet, which end one margin before its right and lower edges."""
    pixels = np.asarray(Image.open(sheet)).astype(int)
    tops = [pixels.shape[0] - (cell + 8) * (rows - row) for row in range(rows)]
    lefts = [pixels.shape[1] - (cell + 8) * (columns - column) for column in range(columns)]
    return [[pixels[top : top + cell, left : left + cell] for left in lefts] for top in tops]


def enlarged(image: Image.Image, cell: int) -> np.ndarray:
    return np.asarray(image.resize((cell, cell), Image.Resampling.NEAREST)).astype(int)


def test_a_sheet_has_the_pipelines_images(restune: Restune, workplace: Path, tmp_path: Path) -> None:
    tuner, output = workplace / "trained" / "disc.safetensors", tmp_path / "sheet.png"
    code, printed, errors = restune(
        "grid", "--base", workplace / "base", "--tuner", tuner, f"{tuner}:0.25", "--weights", "0.5", "1", "--mix",
        "--tuner-guidance", "disc:cond", "--prompt", "a red disc", "a ring", "--images=2", "--seed=4", "--steps=3",
        "--output", output, "--cell=64", "--json", "--device=cpu",
    )  # fmt: skip
    assert code == 0, errors
    assert printed.split() == [str(output), str(tmp_path / "sheet.json")]
    facts = json.loads((tmp_path / "sheet.json").read_text())
    assert [column["label"] for column in facts["columns"]] == ["base", "disc 0.5", "disc 1", "disc-2 0.25", "mix"]
    assert facts["rows"][1] == {"prompt": "a red disc", "seed": 5}
    assert facts["settings"]["steps"] == 3

    drawn = cells(output, columns=5, rows=4, cell=64)
    pipeline = RestuneStableDiffusionPipeline.from_pretrained(workplace / "base")
    for name in ("disc", "disc-2"):
        pipeline.load_tuner_weights(tuner, name)
    for row, (prompt, seed) in {1: ("a red disc", 5), 2: ("a ring", 4)}.items():
        for column, (cond, both) in {0: (0, 0), 1: (0.5, 0), 3: (0, 0.25), 4: (1, 0.25)}.items():
            pipeline.set_tuners({"disc": TunerWeight(float(cond), on="cond"), "disc-2": both})
            generator = torch.Generator("cpu").manual_seed(seed)
            expected = pipeline(prompt, num_inference_steps=3, generator=generator).images[0]
            assert abs(drawn[row][column] - enlarged(expected, 64)).max() <= 1, (row, column)
    assert abs(drawn[0][0] - drawn[0][2]).max() > 2


def test_common_steps_make_one_composition(restune: Restune, workplace: Path, tmp_path: Path) -> None:
    tuner = workplace / "trained" / "disc.safetensors"

    def draw(*arguments: str) -> list[np.ndarray]:
        output = tmp_path / "sheet.png"
        code, _, errors = restune(
            "grid", "--base", workplace / "base", "--tuner", tuner, "--prompt", "a red disc", "--steps=3", "--output",
            output, "--overwrite", "--cell=64", "--device=cpu", *arguments,
        )  # fmt: skip
        assert code == 0, errors
        return cells(output, columns=2, rows=1, cell=64)[0]

    apart, close, same = (draw(f"--share-steps={steps}") for steps in (0, 2, 3))
    np.testing.assert_array_equal(same[0], same[1])
    assert abs(close[0] - close[1]).max() > 0
    assert abs(close[0] - close[1]).mean() < abs(apart[0] - apart[1]).mean()


def test_bad_settings_are_named_before_the_base_is_read(
    restune: Restune, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*given: object) -> None:
        raise AssertionError("the base is loaded")

    monkeypatch.setattr("restune_diffusion.cli.options.placement.load_placed", load)
    tuner = workplace / "trained" / "disc.safetensors"
    for arguments, message in (
        (("--output", "sheet.jpg"), "PNG"),
        (("--share-steps=9", "--steps=3"), "--share-steps 9 is more than --steps 3"),
        (("--tuner", tuner, "--tuner-schedule", "x"), "Invalid schedule segment `x`"),
    ):
        code, _, errors = restune("grid", "--base", workplace / "base", "--device=cpu", "--prompt", "x", *arguments)
        assert code == 1
        assert message in errors
        assert errors.count("\n") == 1


def test_an_unknown_site_is_refused_with_the_valid_ones(restune: Restune, workplace: Path, tmp_path: Path) -> None:
    code, _, errors = restune(
        "generate", "--base", workplace / "base", "--prompt", "x", "--output", tmp_path / "images",
        "--tuner", workplace / "trained" / "disc.safetensors", "--tuner-sites", "skp.0=0.5", "--device=cpu",
    )  # fmt: skip
    assert code == 1
    assert "No site of the tuner matches `skp.0`; its sites are skip.0, skip.1" in errors
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize(("rows", "columns", "side"), [(1, 1, 64), (1, 1, 1024), (20, 10, 512), (3, 30, 512)])
def test_a_page_has_a_sane_size(rows: int, columns: int, side: int) -> None:
    cell = fitting_cell(rows, columns, side)
    images = [[Image.new("RGB", (side, side))] * columns] * rows
    sheet = labelled_grid(images, ["a prompt"] * rows, ["a tuner"] * columns, cell=cell)
    assert cell >= 96
    assert max(sheet.size) <= 4096 + 96
    assert min(sheet.size) >= 192


def test_labels_are_wrapped_and_cut_where_there_is_no_room() -> None:
    font = ImageFont.load_default(size=14)
    text = "a lighthouse " * 30 + "x" * 80
    lines = _wrapped(text, font, 150, 100)
    assert "".join("".join(lines).split()) == text.replace(" ", "")
    assert all(font.getlength(line) <= 150 for line in lines)
    short = _wrapped(text, font, 150, 4)
    assert short[:3] == lines[:3]
    assert len(short) == 4
    assert short[3].endswith("…")
    assert font.getlength(short[3]) <= 150
    assert _wrapped("", font, 150, 4) == []
    assert _wrapped("a café in Łódź", font, 150, 4) == ["a cafe in Łodz"]


def test_wide_images_leave_no_gaps() -> None:
    images = [[Image.new("RGB", (128, 32), "red")] * 2] * 2
    sheet = labelled_grid(images, ["", ""], cell=128)
    red = sum(count for count, color in sheet.getcolors() or [] if color == (255, 0, 0))
    assert red == 4 * 128 * 32
    assert sheet.height < 100


def test_columns_of_different_text_are_generated_apart(restune: Restune, workplace: Path, tmp_path: Path) -> None:
    pipeline = RestuneStableDiffusionPipeline.from_pretrained(workplace / "base")
    for seed, name in enumerate(("dog", "cat")):
        config = TextConfig(tokens=(f"<{name}>",), initializers=("a",))
        word = Tuner.for_base(pipeline.unet, SkipConfig(ratio=0.5), config, text=text_encoders(pipeline))
        randomize(word, seed, std=0.3)
        (tmp_path / name).mkdir()
        save_tuner(word, tmp_path / name / "tuner.safetensors")
        pipeline.load_tuner_weights(word, name, weight=0.0)
    files = [tmp_path / name / "tuner.safetensors" for name in ("dog", "cat")]
    code, _, errors = restune(
        "grid", "--base", workplace / "base", "--tuner", *files, "--weights", "0.5", "1", "--mix",
        "--prompt", "a <dog> <cat>", "--steps=2", "--output", tmp_path / "sheet.png", "--cell=64", "--json",
        "--device=cpu",
    )  # fmt: skip
    assert code == 0, errors
    columns = json.loads((tmp_path / "sheet.json").read_text())["columns"]
    labels = [column["label"] for column in columns]
    assert labels == ["base", "dog/tuner 0.5", "dog/tuner 1", "cat/tuner 0.5", "cat/tuner 1", "mix"]
    record = read_record(tmp_path / "sheet.png")
    assert record.facts["grid"]["columns"] == columns
    assert record.text.startswith("a <dog> <cat>\nSteps: 2, Sampler: DDIM")
    (drawn,) = cells(tmp_path / "sheet.png", columns=6, rows=1, cell=64)
    mixes = [{}, {"dog": 0.5}, {"dog": 1.0}, {"cat": 0.5}, {"cat": 1.0}, {"dog": 1.0, "cat": 1.0}]
    for image, mix in zip(drawn, mixes, strict=True):
        pipeline.set_tuners(mix)
        generator = torch.Generator("cpu").manual_seed(0)
        expected = pipeline("a <dog> <cat>", num_inference_steps=2, generator=generator).images[0]
        assert abs(image - enlarged(expected, 64)).max() <= 1, mix
    shared = ("grid", "--base", workplace / "base", "--tuner", *files, "--prompt", "x", "--steps=2", "--share-steps=1")
    code, _, errors = restune(*shared, "--output", tmp_path / "shared.png", "--device=cpu")
    assert code == 0, errors


def test_white_images_have_a_frame() -> None:
    white = Image.new("RGB", (64, 64), "white")
    for sheet in (
        labelled_grid([[white] * 2], [""], cell=64),
        captioned_grid([white] * 2, [("", "")] * 2, columns=2, cell=64),
    ):
        colors = {color: count for count, color in sheet.getcolors() or []}
        assert colors.pop((255, 255, 255)) > 0
        # A frame of one pixel around each image, and nothing else
        assert list(colors.values()) == [2 * 4 * 65]
