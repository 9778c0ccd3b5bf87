"""The captions of a folder can be read as a table, changed and written, and all other bytes stay."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from restune_diffusion.data.caption_edits.table import plan_table, read_table
from restune_diffusion.utils.errors import DataError, TunerFileError


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "cats"
    (folder / "old").mkdir(parents=True)
    for name in ("a.png", "a.jpg", "b.png", "old/c.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "b.txt").write_text("a cat\n")
    return folder


def test_captions_are_read_from_files_and_images_without_one_are_counted(folder):
    table = read_table(folder)
    assert table.captions == {"a.jpg": "", "a.png": "", "b.png": "a cat", "old/c.png": ""}
    assert table.without == 3


def test_changed_captions_are_written_and_new_files_do_not_share_a_name(folder):
    kept = (folder / "b.txt").stat().st_mtime_ns
    changes = {"a.png": "one", "a.jpg": "two", "b.png": "a cat ", "old/c.png": "three"}
    plan = plan_table(read_table(folder), changes)
    plan.write()
    assert [change.after for change in plan.changes] == ["one", "two", "three"]
    assert read_table(folder).captions == {"a.jpg": "two", "a.png": "one", "b.png": "a cat", "old/c.png": "three"}
    assert (folder / "old" / "c.txt").read_text() == "three"
    assert (folder / "b.txt").stat().st_mtime_ns == kept


def test_rows_of_a_metadata_file_are_changed_and_the_others_stay_as_bytes(folder):
    rows = [
        '{"file_name": "a.png",   "text": "as it is", "id": 7}',
        json.dumps({"file_name": "b.png", "text": ["", "one", "two"]}),
        json.dumps({"file_name": "../secret.png", "text": "outside"}),
        "not JSON",
    ]
    (folder / "metadata.jsonl").write_text("\r\n".join(rows))
    Image.new("RGB", (8, 8)).save(folder.parent / "secret.png")
    table = read_table(folder)
    assert table.captions == {"a.png": "as it is", "b.png": "one"}
    plan_table(table, {"b.png": "first"}).write()
    lines = (folder / "metadata.jsonl").read_bytes().decode().split("\r\n")
    assert [lines[0], *lines[2:]] == [rows[0], *rows[2:]]
    assert json.loads(lines[1])["text"] == ["", "first", "two"]


def test_if_one_file_cannot_be_written_the_new_ones_are_removed(folder):
    (folder / "b.txt").unlink()
    plan = plan_table(read_table(folder), {"a.png": "one", "b.png": "two"})
    # A folder in the place of the second file makes its replacement fail.
    (folder / "b.txt").mkdir()
    with pytest.raises(TunerFileError, match="Cannot write"):
        plan.write()
    assert not (folder / "a.png.txt").exists()


@pytest.mark.parametrize(
    ("name", "caption", "reason"),
    [("elsewhere.png", "x", "not an image of cats"), ("b.png", "a\0b", "NUL"), ("b.png", "\ud800", "broken")],
)
def test_wrong_captions_are_refused(folder, name, caption, reason):
    with pytest.raises(DataError, match=reason):
        plan_table(read_table(folder), {name: caption})
    assert (folder / "b.txt").read_text() == "a cat\n"


def test_a_table_in_csv_is_left_to_other_programs(folder):
    (folder / "metadata.csv").write_text("file_name,text\nb.png,a\n")
    with pytest.raises(DataError, match=r"metadata\.csv"):
        read_table(folder)
