"""Bulk edits of captions: the rules, the files, and that all files change or none."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from restune_diffusion.data.caption_edits import folder as edits
from restune_diffusion.data.caption_edits.rules import CaptionEdit
from restune_diffusion.utils.errors import DataError

Restune = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("settings", "before", "after"),
    [
        ({"find": "a.", "replace": "the "}, "a.cat, acat", "the cat, acat"),
        ({"find": r"(\w+) cat", "replace": r"cat \1", "regex": True}, "red cat, blue cat", "cat red, cat blue"),
        ({"find": "(?i)CAT", "replace": "dog", "regex": True}, "Cat", "dog"),
        ({"find": "(x)?cat", "replace": r"\1dog", "regex": True}, "cat", "dog"),
        ({"prefix": "ink, "}, "a cat", "ink, a cat"),
        ({"prefix": "ink, "}, "ink, a cat", "ink, a cat"),
        ({"suffix": ", ink"}, "a cat", "a cat, ink"),
        ({"remove_duplicate_tags": True}, "cat, red,Cat , red hat", "cat, red, red hat"),
        ({"remove_duplicate_tags": True}, "cat,red ,hat", "cat,red ,hat"),
        ({"remove_tags": ("Watermark", "text")}, "cat, watermark, text on it, text", "cat, text on it"),
        ({"find": "dog", "replace": "cat", "remove_duplicate_tags": True, "prefix": "a, "}, "cat, dog", "a, cat"),
    ],
)
def test_an_edit_changes_a_caption(settings, before, after):
    assert CaptionEdit(**settings)(before) == after


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"find": ""}, "is empty"),
        ({"find": "(", "regex": True}, "is not a regular expression"),
        ({"find": "(a)", "replace": r"\2", "regex": True}, "does not fit"),
    ],
)
def test_an_invalid_edit_is_refused(settings, reason):
    with pytest.raises(DataError, match=reason):
        CaptionEdit(**settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "images"
    (place / "sub").mkdir(parents=True)
    for name in ("a.png", "b.png", "sub/c.png"):
        Image.new("RGB", (8, 8)).save(place / name)
    (place / "a.txt").write_bytes(b"\xef\xbb\xbfa cat\r\n\r\na dog \r\n")
    (place / "b.txt").write_text("a cat\n")
    (place / "sub" / "c.caption").write_text("a boat")
    (place / "notes.txt").write_text("a cat")
    return place


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".png"}


def test_each_line_of_a_caption_file_is_edited_and_the_rest_stays(restune: Restune, folder: Path, tmp_path: Path):
    before = content(folder)
    command = ("data", "edit", folder, "--find", "a cat", "--replace", "the cat", "--suffix", ", ink")
    code, output, errors = restune(*command, "--dry-run")
    assert code == 0, errors
    assert output == (
        "a.txt line 1\n- a cat\n+ the cat, ink\na.txt line 3\n- a dog\n+ a dog, ink\n"
        "b.txt\n- a cat\n+ the cat, ink\nsub/c.caption\n- a boat\n+ a boat, ink\n"
        "4 of 4 captions would change, in 3 files.\n"
    )
    assert content(folder) == before
    code, output, errors = restune(*command, "--backup", tmp_path / "old.zip")
    assert code == 0, errors
    assert output == f"4 of 4 captions changed, in 3 files.\n{tmp_path / 'old.zip'}\n"
    assert content(folder) == {
        **before,
        "a.txt": b"\xef\xbb\xbfthe cat, ink\r\n\r\na dog, ink\r\n",
        "b.txt": b"the cat, ink\n",
        "c.caption": b"a boat, ink",
    }
    # A second time, nothing is left to change.
    assert restune(*command)[1] == "0 of 4 captions changed, in 0 files.\n"
    with zipfile.ZipFile(tmp_path / "old.zip") as archive:
        archive.extractall(folder)
    assert content(folder) == before


def test_rows_of_a_metadata_file_are_edited_and_others_keep_their_bytes(restune: Restune, folder: Path):
    rows = [
        '{"file_name": "a.png", "text": "a cat, \u00e9", "mood": 1}',
        '{"file_name":"b.png",  "text": "a dog"}',
        '{"file_name": "sub/c.png", "text": ["a cat", "cats"]}',
        '{"file_name": "sub/c.png"}',
        '{"file_name": "sub',
    ]
    metadata = folder / "metadata.jsonl"
    metadata.write_text("\n".join(rows), encoding="utf-8")
    code, output, errors = restune("data", "edit", folder, "--find=cat", "--replace=fox")
    assert code == 0, errors
    assert output == (
        "metadata.jsonl line 4 has no caption in `text` and is left as it is.\n"
        "metadata.jsonl line 5 is not a row of JSON and is left as it is.\n3 of 4 captions changed, in 1 file.\n"
    )
    lines = metadata.read_text("utf-8").split("\n")
    assert json.loads(lines[0]) == {"file_name": "a.png", "text": "a fox, \u00e9", "mood": 1}
    assert "\u00e9" in lines[0]
    assert json.loads(lines[2])["text"] == ["a fox", "foxs"]
    assert [lines[1], *lines[3:]] == [rows[1], *rows[3:]]
    # Caption files are not read beside a metadata file, and not changed.
    assert (folder / "b.txt").read_text() == "a cat\n"
    code, output, _ = restune("data", "edit", folder, "--find=1", "--replace=2", "--caption-column=mood")
    assert code == 1


def test_nothing_is_written_if_a_caption_would_be_empty(restune: Restune, folder: Path):
    before = content(folder)
    code, _, errors = restune("data", "edit", folder, "--regex", "--find", "a.*", "--replace", "")
    assert code == 1
    assert "a.txt line 1 would have an empty caption; nothing is written" in errors
    assert content(folder) == before


def test_files_are_restored_if_one_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch):
    before = content(folder)
    plan = edits.plan_edit(folder, CaptionEdit(prefix="x "))
    original = edits._write

    def failing(path: Path, data: bytes) -> None:
        if path.name == "c.caption" and data.startswith(b"x"):
            raise DataError("disk full")
        original(path, data)

    monkeypatch.setattr(edits, "_write", failing)
    with pytest.raises(DataError, match="disk full"):
        plan.write()
    assert content(folder) == before


def test_mistakes_are_one_sentence(restune: Restune, folder: Path, tmp_path: Path):
    def refused(*arguments: str | Path) -> str:
        code, output, errors = restune("data", "edit", *arguments)
        assert (code != 0, output, errors.count("\n")) == (True, "", 1)
        return errors

    assert "There is nothing to edit" in refused(folder)
    assert "belong together" in refused(folder, "--find=x")
    assert "--regex needs --find" in refused(folder, "--regex", "--prefix=x")
    assert "does not exist" in refused(tmp_path / "none", "--prefix=x")
    assert "exists; choose another file" in refused(folder, "--prefix=x", "--backup", folder / "a.txt")
    (folder / "metadata.csv").write_text("file_name,text\na.png,x\n")
    assert "change them in a program for tables" in refused(folder, "--prefix=x")
    (folder / "metadata.csv").unlink()
    for path in (*folder.rglob("*.txt"), *folder.rglob("*.caption")):
        path.unlink()
    assert "has no captions to edit" in refused(folder, "--prefix=x")
