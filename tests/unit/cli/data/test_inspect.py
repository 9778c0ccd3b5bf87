from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from ....tiny_training import draw_image

Restune = Callable[..., tuple[int, str, str]]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, size in enumerate([(64, 64), (128, 64), (128, 64), (40, 80)]):
        draw_image("red", size).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a disc" if number else "a disc, " * 40)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "broken.txt").write_text("x")
    (folder / "notes.md").write_text("x")
    return folder


def test_inspect_lists_the_training_images(restune: Restune, workplace: Path, images: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    code, output, errors = restune(
        "data", "inspect", images, "--base", workplace / "base", "--resolution=64", "--bucketing", "--flip",
        "--trigger-word=sks", "--sheet", sheet,
    )  # fmt: skip
    assert code == 0, errors
    for fact in (
        "4 to train on, 1 left out, 8 views", "80 x 48 (5:3): 2", "64 x 64 (1:1): 1", '"sks, a disc" (3 images)',
        "the text encoder truncates the caption", "3.png 1.2 times", "1.png = 2.png",
        "broken.png is not an image of a known format.", "notes.md is not an image file (unknown extension `.md`).",
        str(sheet),
    ):  # fmt: skip
        assert fact in output, (fact, output)
    with Image.open(sheet) as image:
        colors = image.convert("RGB").getcolors(1 << 24)
        assert colors is not None
        assert (255, 0, 0) in {color for _, color in colors}


def test_inspect_without_a_base_prints_json_for_other_programs(restune: Restune, images: Path) -> None:
    code, output, errors = restune("data", "inspect", images, "--json")
    assert code == 0, errors
    report = json.loads(output)
    assert report["buckets"] == [{"width": 512, "height": 512, "images": 4}]
    assert [each["name"] for each in report["left_out"]] == ["broken.png", "notes.md"]
    assert report["files"][3] == {
        "name": "3.png", "caption": "a disc", "width": 40, "height": 80, "bucket": [512, 512], "repeats": 1,
        "views": 1,
    }  # fmt: skip


def test_inspect_shows_the_variants_of_captions(restune: Restune, images: Path) -> None:
    (images / "1.txt").write_text("a, b, c, {big|small}\na disc")
    (images / "2.txt").write_text("{a|")
    given = (images, "--captions=all", "--shuffle-tags", "--keep-tags=1", "--wildcards", "--seed=3")
    code, output, errors = restune("data", "inspect", *given)
    assert code == 0, errors
    lines = [line[12:] for line in output.splitlines()]
    place = lines.index("1 image with 4 distinct variants of 2 captions, 4 texts together")
    assert lines[place + 1] == "for example of 1.png:"
    shown = lines[place + 2 : place + 6]
    assert '"a disc"' in shown
    assert sum(line.startswith('"a, ') and "{" not in line for line in shown) == 3
    assert "The caption of 2.png has braces that do not pair up" in output
    _, again, _ = restune("data", "inspect", *given, "--json")
    files = json.loads(again)["files"]
    assert [f'"{text}"' for text in files[1]["variants"]] == shown
    assert (files[1]["written"], files[3]["written"], files[3]["variants"]) == (2, 1, ["a disc"])
    code, _, errors = restune("data", "inspect", images, "--keep-tags=1")
    assert (code, errors.count("\n")) == (2, 1)
    assert "keep_tags is given, but tags are neither shuffled nor dropped" in errors


def test_inspect_ends_with_an_error_if_no_image_can_be_used(restune: Restune, images: Path) -> None:
    for path in images.glob("*.txt"):
        path.unlink()
    code, output, errors = restune("data", "inspect", images)
    assert code == 1
    assert output.count("has no caption") == 5
    assert "None of the images" in errors
    assert errors.count("\n") == 1
    code, _, errors = restune("data", "inspect", images / "none")
    assert code == 1
    assert "does not exist" in errors
    code, _, errors = restune("data", "inspect", images, "--prompt=x", "--sheet=sheet.doc")
    assert code == 1
    assert "is not an image file" in errors


def test_help_has_an_example(restune: Restune) -> None:
    code, output, _ = restune("data", "--help")
    assert code == 0
    assert "Example: restune data inspect" in output
