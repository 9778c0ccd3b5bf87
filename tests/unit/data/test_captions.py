from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from restune_diffusion.data.captions import find_examples
from restune_diffusion.utils.errors import DataError

from ...tiny_training import draw_image, write_images


def save(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        draw_image("red").save(folder / name)


def write_metadata(folder: Path, *lines: str, encoding: str = "utf-8") -> None:
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding=encoding)


def test_metadata_gives_images_and_captions_in_its_order(tmp_path: Path) -> None:
    save(tmp_path, "b.png", "sub/a.png")
    rows = [{"file_name": "sub/a.png", "text": " first "}, {"file_name": "b.png", "text": "second"}]
    write_metadata(tmp_path, json.dumps(rows[0]), "", json.dumps(rows[1]), encoding="utf-8-sig")
    found = [(example.path.name, example.caption) for example in find_examples(tmp_path)]
    assert found == [("a.png", "first"), ("b.png", "second")]


def test_metadata_decides_which_images_are_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, "a.png", "left-out.png")
    write_metadata(tmp_path, '{"file_name": "a.png", "text": "a"}')
    with caplog.at_level(logging.WARNING):
        assert len(find_examples(tmp_path)) == 1
    assert "1 image, first" in caplog.text


def test_sidecar_captions_win_over_the_prompt(tmp_path: Path) -> None:
    save(tmp_path, "b.png", "a.jpg", ".hidden.png")
    (tmp_path / "a.txt").write_text("own caption\n")
    found = [(example.path.name, example.caption) for example in find_examples(tmp_path, "for all")]
    assert found == [("a.jpg", "own caption"), ("b.png", "for all")]


def test_prompt_fills_rows_without_a_caption(tmp_path: Path) -> None:
    save(tmp_path, "a.png")
    write_metadata(tmp_path, '{"file_name": "a.png"}')
    assert find_examples(tmp_path, "for all")[0].caption == "for all"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "gone.png", "text": "x"}', r"line 2 names gone\.png, but there is no such file"),
        ('{"file_name": "red.png", "text": "x"', r"line 2 is not valid JSON"),
        ('{"file": "red.png", "text": "x"}', r"line 2 names no image"),
        ('["red.png"]', r"line 2 names no image"),
        ('{"file_name": "red.png"}', r"line 2 has no caption"),
        ('{"file_name": "red.png", "text": "  "}', r"line 2 has no caption"),
        ('{"file_name": "red.png", "text": 3}', r"line 2 has no caption"),
    ],
)
def test_faults_in_metadata_are_named_with_their_line(tmp_path: Path, line: str, message: str) -> None:
    folder = write_images(tmp_path / "data", ["red"])
    write_metadata(folder, '{"file_name": "red.png", "text": "a red disc"}', line)
    with pytest.raises(DataError, match=message):
        find_examples(folder)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        find_examples(tmp_path / "gone")
    with pytest.raises(DataError, match="has no images"):
        find_examples(tmp_path, "prompt")
    write_metadata(tmp_path, "")
    with pytest.raises(DataError, match="has no images"):
        find_examples(tmp_path, "prompt")


def test_an_image_without_a_caption_is_named(tmp_path: Path) -> None:
    save(tmp_path, "a.png")
    with pytest.raises(DataError, match=r"a\.png has no caption.*a\.txt"):
        find_examples(tmp_path)


def test_a_caption_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8"):
        find_examples(tmp_path)
