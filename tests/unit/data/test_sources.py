from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from restune_diffusion.data.captions import apply_rule, find_examples, read_examples
from restune_diffusion.data.config import DataConfig
from restune_diffusion.data.refusals import Refused
from restune_diffusion.storage.tuner_file import read_info
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.utils.errors import DataError

from ...tiny_training import draw_image, write_images

MakeConfig = Callable[..., TrainConfig]


def save(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        draw_image("red").save(folder / name)


def read(folder: Path, **settings: Any) -> tuple[list[tuple[str, str, int]], list[str]]:
    refused: list[Refused] = []
    examples = read_examples(DataConfig(data=folder, **settings), refused)
    found = [(str(example.path.relative_to(folder)), example.caption, example.repeats) for example in examples]
    return found, [str(each.inside(folder)) for each in refused]


def test_a_csv_file_is_read_as_the_json_lines(tmp_path: Path) -> None:
    save(tmp_path, "a.png", "sub/b.png", "c.png")
    with (tmp_path / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows([["text", "file_name"], ['a "disc", red\nand round', "sub/b.png"], ["", "a.png"]])
    found, refused = read(tmp_path, prompt="for all")
    assert found == [("sub/b.png", 'a "disc", red\nand round', 1), ("a.png", "for all", 1)]
    assert refused == ["c.png has no usable row in metadata.csv."]
    assert [example.caption for example in find_examples(tmp_path, "p")] == ['a "disc", red\nand round', "p"]


def test_faults_of_a_csv_file_are_named(tmp_path: Path) -> None:
    save(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text("file,text\na.png,x\n")
    with pytest.raises(DataError, match="has no column file_name"):
        read(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\ngone.png,x\na.png\n")
    found, refused = read(tmp_path)
    assert found == [("a.png", "x", 1)]
    assert refused[0].startswith("metadata.csv line 3 names gone.png, but there is no such file")
    assert refused[1].startswith("metadata.csv line 4 has no caption")


def test_a_row_that_is_half_written_is_left_out_and_named(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "data", ["red", "blue"])
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "red.png", "te')
    found, refused = read(folder)
    assert [caption for _, caption, _ in found] == ["a red disc", "a blue disc"]
    assert len(refused) == 1
    assert refused[0].startswith("metadata.jsonl line 3 is not valid JSON")


def test_another_caption_column_can_be_named(tmp_path: Path) -> None:
    save(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "no", "long": "yes"}')
    assert read(tmp_path, caption_column="long")[0] == [("a.png", "yes", 1)]


def test_folders_with_a_number_repeat_their_images_if_asked(tmp_path: Path) -> None:
    save(tmp_path, "10_sks dog/a.png", "10_sks dog/deep/b.png", "2_/c.png", "plain/d.png", "0_off/e.png")
    (tmp_path / "10_sks dog" / "a.txt").write_text("own")
    (tmp_path / "plain" / "d.txt").write_text("own")
    found, refused = read(tmp_path, folder_repeats=True)
    assert found == [
        ("0_off/e.png", "off", 1),
        ("10_sks dog/a.png", "own", 10),
        ("10_sks dog/deep/b.png", "sks dog", 10),
        ("plain/d.png", "own", 1),
    ]
    assert len(refused) == 1
    assert refused[0].startswith("2_/c.png has no caption")
    plain, _ = read(tmp_path, prompt="for all")
    assert {repeats for _, _, repeats in plain} == {1}
    assert ("10_sks dog/deep/b.png", "for all", 10) in read(tmp_path, folder_repeats=True, prompt="for all")[0]
    assert read(tmp_path / "10_sks dog", folder_repeats=True)[0][1] == ("deep/b.png", "sks dog", 10)


@pytest.mark.parametrize(
    ("caption", "trigger", "template", "expected"),
    [
        ("a dog", None, None, "a dog"),
        ("a dog", "sks", None, "sks, a dog"),
        ("a SKS dog", "sks", None, "a SKS dog"),
        ("a task", "sks", None, "sks, a task"),
        ("asks", "sks", None, "sks, asks"),
        ("a dog", "sks", "{caption}, in {trigger} style", "a dog, in sks style"),
        ("a sks dog", "sks", "{trigger}, {caption}", "sks, a sks dog"),
        ("with {trigger} {0} {", "sks", "{trigger}: {caption}", "sks: with {trigger} {0} {"),
        ("a dog", None, "photo, {caption}", "photo, a dog"),
    ],
)
def test_trigger_and_template(caption: str, trigger: str | None, template: str | None, expected: str) -> None:
    config = DataConfig(data=Path("x"), trigger_word=trigger, caption_template=template)
    assert apply_rule(caption, config) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"caption_template": "{captoin}"}, r"unknown field \{captoin\}; use \{trigger\} and \{caption\}"),
        ({"caption_template": "{trigger}"}, "there is no trigger_word"),
        ({"mask_data": Path("masks")}, "masked_loss is not files"),
        ({"bucket_no_upscale": True}, "settings of bucketing"),
        ({"crop_variants": 3}, "for random crops"),
        ({"unmasked_weight": 0.5}, "not masked"),
        ({"background": (0, 0, 256)}, "from 0 to 255"),
        ({"buckets": True}, "did you mean bucketing"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(data=Path("x"), **settings)


def test_the_tuner_records_its_trigger_word(config: MakeConfig, tmp_path: Path) -> None:
    result = train(config(steps=1, trigger_word="sks"), verbose=False)
    info = read_info(result.path)
    assert info.training["trigger_words"] == ["sks"]
    assert info.metadata["modelspec.trigger_phrase"] == "sks"
    sheet = json.loads((tmp_path / "out" / "data.json").read_text())
    assert sorted(caption["text"] for caption in sheet["captions"])[0] == "sks, a blue disc"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved dataset of three rows, one of them without an image."""
    datasets = pytest.importorskip("datasets")
    pictures = [draw_image("red"), None, draw_image("blue", (30, 20))]
    columns = {"image": pictures, "text": ["red", "none", " "], "label": [0, 1, 2]}
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.Value("int64")}
    )
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_dataset_is_trained_on(saved: Path, config: MakeConfig) -> None:
    found, refused = read(saved)
    assert found == [("row 0", "red", 1), ("row 1", "none", 1)]
    assert refused == ["row 2 has no caption in text; set one prompt for all images."]
    settings = config(data=saved, prompt="blue", steps=1)
    train(settings, verbose=False)
    sheet = json.loads((settings.output / "data.json").read_text())
    assert [(each["name"], each["caption"], each["width"]) for each in sheet["files"]] == [
        ("row 0", "red", 24), ("row 2", "blue", 30),
    ]  # fmt: skip
    assert sheet["left_out"] == [{"name": "row 1", "reason": "has no image", "fault": True}]


def test_columns_and_splits_of_a_saved_dataset_are_checked(saved: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    with pytest.raises(DataError, match="no image column picture; its columns are image, text, label"):
        read(saved, image_column="picture")
    with pytest.raises(DataError, match="no image column label"):
        read(saved, image_column="label")
    with pytest.raises(DataError, match="no column words; its columns are image, text, label"):
        read(saved, caption_column="words")
    rows = datasets.load_from_disk(saved)
    datasets.DatasetDict({"train": rows.select([0]), "test": rows}).save_to_disk(tmp_path / "splits")
    assert len(read(tmp_path / "splits")[0]) == 1
    datasets.DatasetDict({"one": rows, "two": rows}).save_to_disk(tmp_path / "other")
    with pytest.raises(DataError, match="has the splits one, two but no split train"):
        read(tmp_path / "other")
    (saved / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        read(saved)


def test_a_saved_dataset_without_the_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'restune-diffusion\[datasets\]'"):
        read(tmp_path)


def test_the_plan_lists_what_is_left_out(
    config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / "data", ["red", "blue"])
    (folder / "red.png").write_bytes(b"no image")
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "gone.png", "text": "x"}\n{"fil')
    train(config(data=folder, steps=1))
    shown = capsys.readouterr().out
    assert "images      1 at 16 x 16, 1 caption\n" in shown
    assert "left out    metadata.jsonl line 3 names gone.png" in shown
    assert "            metadata.jsonl line 4 is not valid JSON" in shown
    assert "            red.png is not an image of a known format." in shown
    (folder / "blue.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"None of the images in .* can be used: .* 3 more are left out too"):
        train(config(data=folder, steps=1, output=tmp_path / "other"))


def test_the_plan_has_a_line_for_each_kind_of_file_that_is_not_used(
    config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / "2_discs", ["red"])
    for name in ("a.jxl", "b.jxl"):
        (folder / name).write_bytes(b"?")
    save(folder, "c.png")
    train(config(data=folder, steps=1))
    shown = capsys.readouterr().out.splitlines()
    assert (
        "hint        The folder 2_discs is named as kohya's scripts expect; set --folder-repeats to repeat its "
        in "".join(shown)
    )
    assert "not used    3 files, a.jxl first: each has no usable row in metadata.jsonl" in shown
    assert "training    1 step of 2 images = 2.0 epochs" in shown
