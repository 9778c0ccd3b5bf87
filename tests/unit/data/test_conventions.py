"""Conventions of other tools' data folders: what is read, what is refused, and what is reported as not used."""

from __future__ import annotations

import json
import os
import struct
from io import BytesIO
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin
from transformers import CLIPTokenizer

import restune_diffusion
from restune_diffusion import ControlConfig
from restune_diffusion.data.captions import read_examples
from restune_diffusion.data.condition_source import ConditionSource
from restune_diffusion.data.config import DataConfig
from restune_diffusion.data.conventions.image_suffixes import readable_suffixes
from restune_diffusion.data.data_sheet import DataSheet, Entry
from restune_diffusion.data.example import Example
from restune_diffusion.data.image_transform import ImageTransform
from restune_diffusion.data.inspection import Frame, inspect_data
from restune_diffusion.data.loss_masks import MaskFiles
from restune_diffusion.data.training_images import load_samples
from restune_diffusion.imaging.image_files import decode_layer
from restune_diffusion.utils.errors import DataError

BASE = Path(restune_diffusion.__file__).parent / "assets" / "restune-tiny"
RED = (220, 30, 30)


def save(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), RED).save(path)


def read(folder: Path, **settings: Any) -> tuple[dict[str, str], DataSheet]:
    sheet = DataSheet(folder, [])
    examples = read_examples(DataConfig(data=folder, **settings), sheet.refused)
    return {os.path.relpath(example.path, folder): example.caption for example in examples}, sheet


@pytest.mark.parametrize("full", ["{stem}", "{name}"])
@pytest.mark.parametrize("suffix", [".txt", ".caption", ".TXT", ".Caption"])
def test_every_form_of_a_caption_file_is_read(tmp_path: Path, suffix: str, full: str) -> None:
    save(tmp_path / "10_sks dog" / "a.b.png")
    (tmp_path / "10_sks dog" / (full.format(stem="a.b", name="a.b.png") + suffix)).write_text("own")
    for settings in ({}, {"prompt": "sks dog"}, {"folder_repeats": True}):
        found, sheet = read(tmp_path, **settings)
        assert found == {"10_sks dog/a.b.png": "own"}
        assert not sheet.refused


def test_the_nearest_of_several_caption_files_is_read(tmp_path: Path) -> None:
    save(tmp_path / "a.png", tmp_path / "a.jpg")
    for name in ("a.caption", "a.TXT", "a.txt", "a.png.caption", "a.png.txt"):
        (tmp_path / name).write_text(name)
        found, _ = read(tmp_path, prompt="for all")
        expected = name if name != "a.txt" else "a.txt"
        assert found["a.png"] == expected
    assert found == {"a.png": "a.png.txt", "a.jpg": "a.txt"}


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "METADATA.JSONL"])
def test_metadata_of_the_split_folder_is_read(tmp_path: Path, name: str) -> None:
    save(tmp_path / "train" / "a.png", tmp_path / "test" / "b.png")
    row = "file_name,text\na.png,own\n" if name.endswith("csv") else '{"file_name": "./a.png", "text": "own"}\n'
    (tmp_path / "train" / name).write_text(row)
    found, sheet = read(tmp_path, prompt="for all")
    assert found == {"train/a.png": "own"}
    assert sheet.unused() == [f"test/b.png has no usable row in train/{name}"]


def test_what_is_not_used_has_one_line_for_each_kind(tmp_path: Path) -> None:
    save(tmp_path / "a.png", tmp_path / "b.png", tmp_path / "a-masklabel.png", tmp_path / "b-condlabel.png")
    for name in ("x.txt", "y.caption", "a.tags", "b.tags", "photo.jxl", "LICENSE"):
        (tmp_path / name).write_text("words")
    found, sheet = read(tmp_path, prompt="for all")
    assert set(found) == {"a.png", "b.png"}
    assert sorted(sheet.unused()) == [
        "2 files, a.tags first: each is not an image file (unknown extension `.tags`), and captions are read from "
        ".txt and .caption files",
        "2 files, x.txt first: each is a caption file without an image of the same name",
        "LICENSE is not an image file",
        "a-masklabel.png is the mask of an image; set --masked-loss files to use it",
        "b-condlabel.png is the condition image of an image; give condition images with --control-data",
        "photo.jxl is not an image file (unknown extension `.jxl`)",
    ]


FORMATS = Image.registered_extensions()
WRITABLE = sorted(suffix for suffix in readable_suffixes() if FORMATS[suffix] in Image.SAVE)


@pytest.mark.parametrize("suffix", WRITABLE)
def test_every_image_suffix_of_pillow_is_read(tmp_path: Path, suffix: str) -> None:
    kind = FORMATS[suffix]
    white = Image.new("1" if kind in ("MSP", "XBM") else "L" if suffix == ".pfm" else "RGB", (32, 32), "white")
    (white.convert("F") if suffix == ".pfm" else white.convert("P") if kind == "BLP" else white).save(
        tmp_path / f"a{suffix.upper()}", format=kind
    )
    found, sheet = read(tmp_path, prompt="x")
    assert list(found) == [f"a{suffix.upper()}"]
    (sample, *_) = list(
        load_samples([Example(tmp_path / name, "x") for name in found], 32, refused=sheet.refused)
    ) or [None]
    if suffix == ".pfm":
        assert "floating-point pixels" in str(sheet.refused[0])
    else:
        assert sample is not None, sheet.refused
        assert set(np.abs(sample.pixels.numpy().round(1)).ravel()) == {1.0}


def test_suffixes_that_pillow_does_not_decode_are_not_images() -> None:
    assert not readable_suffixes() & {".eps", ".ps", ".mpg", ".h5", ".wmf", ".pdf", ".txt"}
    assert {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".tif"} <= readable_suffixes()


def test_heif_images_are_read_or_the_extra_is_named(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "b.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    found, sheet = read(tmp_path, prompt="x")
    if ".heic" in readable_suffixes():
        Image.new("RGB", (32, 32), RED).save(tmp_path / "b.HEIC", format="HEIF")
        sample = next(load_samples([Example(tmp_path / "b.HEIC", "x")], 32))
        assert sample.pixels[0].mean() > 0.5 > sample.pixels[1].mean()
    else:
        assert list(found) == ["a.png"]
        assert "restune-diffusion[heif]" in sheet.notes()[0]


def masks(folder: Path, *names: str) -> None:
    """Save masks with a gray level of their own: 10 for the first, 20 for the second."""
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names, start=1):
        Image.new("L", (32, 32), number * 10).save(folder / name, quality=100, lossless=True)


SUFFIXES = (".png", ".jpg", ".webp", ".bmp")


@pytest.mark.parametrize(("one", "other"), list(permutations(SUFFIXES, 2)))
def test_images_of_one_stem_get_masks_and_conditions_of_their_full_name(tmp_path: Path, one: str, other: str) -> None:
    names = (f"1{one}", f"1{other}")
    save(*(tmp_path / "images" / name for name in names))
    masks(tmp_path / "masks", *names)
    source = MaskFiles(tmp_path / "masks", tmp_path / "images")
    layer = Image.new("RGB", (32, 32))
    examples = [Example(tmp_path / "images" / name, "x") for name in names]
    levels = [np.asarray(source(example, layer)).mean() for example in examples]
    assert levels == pytest.approx([10, 20], abs=2)
    paired = ConditionSource(ControlConfig(conditions=("edges",)), tmp_path / "masks").paired(
        examples, tmp_path / "images"
    )
    assert [each.conditions["edges"].name for each in paired] == list(names)
    # The second image has no file of its own any more: the first one's must not be taken.
    (tmp_path / "masks" / names[1]).unlink()
    with pytest.raises(DataError, match=f"differs from 1\\{one} only in its suffix"):
        MaskFiles(tmp_path / "masks", tmp_path / "images")(examples[1], layer)
    with pytest.raises(DataError, match="is ambiguous"):
        ConditionSource(ControlConfig(conditions=("edges",)), tmp_path / "masks").paired(examples, tmp_path / "images")


@pytest.mark.parametrize(("one", "other"), [pair for pair in permutations(SUFFIXES, 2) if pair[0] < pair[1]])
def test_two_masks_of_one_stem_are_refused(tmp_path: Path, one: str, other: str) -> None:
    image = tmp_path / "images" / "1.tif"
    save(image)
    masks(tmp_path / "masks", f"1{one}", f"1{other}")
    with pytest.raises(DataError, match=f"fits .*1\\{one} and .*1\\{other}"):
        MaskFiles(tmp_path / "masks", tmp_path / "images")(Example(image, "x"), Image.new("RGB", (32, 32)))
    masks(tmp_path / "masks", "other.png", "1.tif.png")
    mask = MaskFiles(tmp_path / "masks", tmp_path / "images")(Example(image, "x"), Image.new("RGB", (32, 32)))
    assert np.asarray(mask).max() == 20


def test_masks_beside_the_images_are_used_and_never_trained_on(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg", tmp_path / "b.png", tmp_path / "c.png")
    Image.new("L", (32, 32), 51).save(tmp_path / "a-masklabel.png")
    Image.new("L", (32, 32), 102).save(tmp_path / "b-masklabel.PNG")
    config = DataConfig(data=tmp_path, prompt="x", masked_loss="files")
    sheet = DataSheet(tmp_path, [])
    examples = read_examples(config, sheet.refused)
    assert not sheet.refused
    transform = ImageTransform.of(config, 32, 8, 0)
    samples = list(load_samples(examples, 32, preparation=transform, refused=sheet.refused))
    assert [Path(sample.name).name for sample in samples] == ["a.jpg", "b.png"]
    assert [float(sample.mask.mean()) for sample in samples if sample.mask is not None] == pytest.approx([0.2, 0.4])
    assert "has no mask c-masklabel.png beside it" in str(sheet.refused[0])


def test_partners_are_found_through_links_and_other_spellings_of_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "store" / "a.png")
    (tmp_path / "images").symlink_to(tmp_path / "store")
    masks(tmp_path / "masks", "a.png")
    monkeypatch.chdir(tmp_path)
    for root, image in (
        ("images", "store/a.png"),
        ("./images", "images/../images/a.png"),
        ("images", str(tmp_path / "store/a.png")),
    ):
        mask = MaskFiles(Path("masks"), Path(root))(Example(Path(image), "x"), Image.new("RGB", (32, 32)))
        assert np.asarray(mask).max() == 10


@pytest.mark.parametrize("spelling", ["a.png", "./a.png", "sub/../a.png", "link.png", "sub\\b.png", "{folder}/a.png"])
def test_a_named_image_counts_as_used_however_its_path_is_spelled(tmp_path: Path, spelling: str) -> None:
    save(tmp_path / "a.png", tmp_path / "sub" / "b.png")
    (tmp_path / "link.png").symlink_to("a.png")
    rows = [{"file_name": spelling.format(folder=tmp_path), "text": "own"}, {"file_name": "sub/b.png", "text": "b"}]
    rows += [] if "b.png" not in spelling else [{"file_name": "a.png", "text": "a"}]
    (tmp_path / "metadata.jsonl").write_text("\r\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    sheet = DataSheet(tmp_path, [])
    examples = read_examples(DataConfig(data=tmp_path), sheet.refused)
    assert examples[0].caption == "own"
    assert not sheet.refused


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_csv_rows_with_too_many_fields_are_left_out_and_named(tmp_path: Path, newline: str, encoding: str) -> None:
    save(tmp_path / "a.png", tmp_path / "b.png")
    lines = ["file_name,text", "a.png,1girl, solo, red hat", 'b.png,"1girl, solo"', ""]
    (tmp_path / "metadata.csv").write_text(newline.join(lines), encoding=encoding, newline="")
    found, sheet = read(tmp_path)
    assert found == {"b.png": "1girl, solo"}
    assert sheet.notes()[0].startswith("metadata.csv line 2 has 4 fields for 2 columns; put a caption that contains")


def test_faulty_columns_are_named(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text,text\na.png,x,y\n")
    with pytest.raises(DataError, match="two columns 'text'"):
        read(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,caption\na.png,x\n")
    with pytest.raises(DataError, match="--caption-column"):
        read(tmp_path)
    assert read(tmp_path, caption_column="caption")[0] == {"a.png": "x"}


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """Return EXIF data with these entries: tag, type, count and value."""
    data, start = b"", 8 + 2 + 12 * len(entries) + 4
    table = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    for tag, kind, count, value in entries:
        short = len(value) <= 4
        table += struct.pack("<HHI", tag, kind, count)
        table += value.ljust(4, b"\0") if short else struct.pack("<I", start + len(data))
        data += b"" if short else value
    return b"Exif\0\0" + table + b"\0\0\0\0" + data


ODD_ENTRIES = {
    "none": [],
    "negative resolution": [(0x11A, 10, 1, struct.pack("<ii", -1, 1))],
    "text for the width": [(0x100, 2, 4, b"abc\0")],
}


@pytest.mark.parametrize("odd", ODD_ENTRIES)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_applied_beside_odd_entries(orientation: int, odd: str) -> None:
    image = Image.effect_noise((16, 8), 80)
    file = BytesIO()
    entries = sorted([(0x112, 3, 1, struct.pack("<H", orientation)), *ODD_ENTRIES[odd]])
    image.save(file, format="PNG", exif=exif(*entries))
    expected = image.copy()
    expected.getexif()[0x112] = orientation
    turned, _ = decode_layer(file.getvalue())
    assert np.array_equal(np.asarray(turned)[..., 0], np.asarray(ImageOps.exif_transpose(expected)))


@pytest.mark.parametrize(
    ("kind", "garbage"), [("PNG", b"garbage!"), ("WEBP", b"Exif\0\0garb"), ("JPEG", b"Exif\0\0garb")]
)
def test_garbage_for_exif_data_does_not_cost_an_image(kind: str, garbage: bytes) -> None:
    file = BytesIO()
    Image.new("RGB", (8, 8), "white").save(file, format=kind, exif=garbage)
    assert decode_layer(file.getvalue())[0].getpixel((0, 0)) == (255, 255, 255)


def test_large_text_in_a_png_does_not_cost_an_image_but_too_many_pixels_do(monkeypatch: pytest.MonkeyPatch) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * (3 << 20), zip=True)
    text.add_itxt("prompt", "x" * (3 << 20), zip=True)
    file = BytesIO()
    image = Image.effect_noise((16, 8), 80)
    image.save(file, format="PNG", pnginfo=text, icc_profile=bytes(3 << 20))
    assert np.array_equal(np.asarray(decode_layer(file.getvalue())[0])[..., 0], np.asarray(image))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16)
    with pytest.raises(Image.DecompressionBombError):
        decode_layer(file.getvalue())


def test_the_vectors_of_a_placeholder_token_count(tmp_path: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(BASE, subfolder="tokenizer")
    caption = " ".join(["a"] * 14) + " <X> in the snow"
    for vectors, expected in ((64, {caption: 14 + 64 + 3 + 2}), (58, {}), (59, {caption: 14 + 59 + 3 + 2})):
        sheet = DataSheet(tmp_path, [], [Entry("a.png", caption, (8, 8), (8, 8), 1, 1, b"")])
        sheet.count_tokens([tokenizer], {"<x>": vectors})
        assert sheet.beyond_limit == expected


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_a_tiff_is_applied_once(orientation: int) -> None:
    file = BytesIO()
    image = Image.effect_noise((16, 8), 80)
    image.save(file, format="TIFF", tiffinfo={0x112: orientation})
    with Image.open(BytesIO(file.getvalue())) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    assert np.array_equal(np.asarray(decode_layer(file.getvalue())[0])[..., 0], expected)


def test_hints_name_numbered_folders_and_bucketing_without_effect(tmp_path: Path) -> None:
    save(tmp_path / "10_sks dog" / "a.png")
    frame = Frame(64, 64)
    for settings, expected in (
        ({"folder_repeats": True}, []),
        ({}, ["The folder 10_sks dog is named as kohya's scripts expect; set --folder-repeats"]),
        ({"folder_repeats": True, "bucketing": True}, ["Bucketing has no effect"]),
    ):
        sheet = DataSheet(tmp_path, [])
        inspect_data(DataConfig(data=tmp_path, prompt="x", **settings), frame, sheet)
        assert len(sheet.hints) == len(expected)
        assert all(hint.startswith(start) for hint, start in zip(sheet.hints, expected, strict=True))


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_text_in_another_column_than_that_of_the_captions_is_named(tmp_path: Path, name: str) -> None:
    save(tmp_path / "a.png", tmp_path / "b.png")
    csv = "file_name,text,caption\na.png,,red\nb.png,blue,ignored\n"
    lines = '{"file_name": "a.png", "caption": "red"}\n{"file_name": "b.png", "text": "blue", "caption": "ignored"}\n'
    (tmp_path / name).write_text(csv if name.endswith("csv") else lines)
    found, sheet = read(tmp_path, prompt="sks")
    assert found == {"a.png": "sks", "b.png": "blue"}
    assert sheet.unused() == [
        f"{name} has 1 row without a caption in `text`, but with text in `caption`, which is not read; "
        f"set --caption-column caption to train on it"
    ]
    found, sheet = read(tmp_path, prompt="sks", caption_column="caption")
    assert (found, sheet.unused()) == ({"a.png": "red", "b.png": "ignored"}, [])
