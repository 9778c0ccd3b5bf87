"""Arbitrary data folders give no traceback, and every file is used or listed with a reason."""

from __future__ import annotations

import io
import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from restune_diffusion.data.config import DataConfig
from restune_diffusion.data.data_sheet import DataSheet
from restune_diffusion.data.inspection import Frame, describe_data, inspect_data
from restune_diffusion.utils.display import printable
from restune_diffusion.utils.errors import DataError


def encoded(mode: str, size: tuple[int, int], kind: str, frames: int = 1) -> bytes:
    stream = io.BytesIO()
    pictures = [Image.new(mode, size, number * 40) for number in range(frames)]
    pictures[0].save(stream, kind, **({"save_all": True, "append_images": pictures[1:]} if frames > 1 else {}))
    return stream.getvalue()


GOOD = encoded("RGB", (20, 18), "PNG")
CONTENTS: dict[str, bytes] = {
    "png": GOOD,
    "jpeg": encoded("RGB", (40, 20), "JPEG"),
    "cmyk": encoded("CMYK", (20, 20), "JPEG"),
    "gif": encoded("P", (20, 20), "GIF", frames=3),
    "webp": encoded("RGB", (20, 20), "WEBP", frames=2),
    "deep": encoded("I;16", (20, 20), "PNG"),
    "float": encoded("F", (20, 20), "TIFF"),
    "dot": encoded("RGB", (1, 1), "PNG"),
    "line": encoded("RGB", (20_000, 1), "PNG"),
    "bomb": encoded("1", (20_000, 20_000), "PNG"),
    "empty": b"",
    "cut": GOOD[: len(GOOD) // 2],
    "text": b"no image",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "zip": b"PK\x03\x04" + bytes(40),
}
CAPTIONS = [b"a disc", b"", b"  \n", b"with\0nul", "Grüße".encode("latin-1"), "雪 ❄️".encode(), b"\xef\xbb\xbfmarked",
            "wide".encode("utf-16-le"), b"{trigger} {0}", b"word " * 500]  # fmt: skip
NAMES = [
    "a",
    "b",
    "a b",
    "雪",
    "e\u0301",
    "\u00e9",
    "x\ny",
    "-rf",
    "'quoted'",
    "dot.ted",
    "\udcff",
    "sub/a",
    "10_cat/b",
    ".",
]
SUFFIXES = [".png", ".PNG", ".jpg", ".jpeg", ".webp", ".gif", ".tiff", ".txt", ".heic", ""]
ROWS = ['{"file_name": "a.png", "text": "a"}', '{"file_name": "a.png", "te', "[]", "null", "{}", "", "\x00",
        '{"file_name": "../gone.png", "text": "a"}', '{"file_name": "a\\u0000.png", "text": "a"}',
        '{"file_name": "a.png", "text": "\\ud800"}', '{"file_name": "a.png", "text": "a\\u0000b"}',
        '{"file_name": "' + "x" * 5000 + '", "text": "a"}', "[" * 100_000, "9" * 10_000,
        '{"file_name": "a.png", "text": 5}', '{"file_name": 5}', '{"file_name": "", "text": "a"}',
        '{"file_name": "a.png", "text": "a", "conditions": [5]}', "file_name,text", "a.png,a",
        'a.png,"a', "b.jpg"]  # fmt: skip

FILES = st.dictionaries(
    st.tuples(st.sampled_from(NAMES), st.sampled_from(SUFFIXES)),
    st.one_of(
        st.sampled_from(sorted(CONTENTS)).map(CONTENTS.__getitem__),
        st.sampled_from(CAPTIONS),
        st.binary(max_size=60),
        st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)).map(
            lambda damage: GOOD[: damage[0]] + bytes([damage[1]]) + GOOD[damage[0] + 1 :]
        ),
        st.sampled_from(["dangling", "loop", "folder", "linked folder", "pipe", "link"]),
    ),
    max_size=8,
)
METADATA = st.dictionaries(
    st.sampled_from(["metadata.jsonl", "metadata.csv"]), st.lists(st.sampled_from(ROWS), max_size=5), max_size=2
)
OPTIONS = st.fixed_dictionaries(
    {
        "prompt": st.sampled_from([None, "for all"]),
        "folder_repeats": st.booleans(),
        "bucketing": st.booleans(),
        "flip": st.booleans(),
        "crop": st.sampled_from(["center", "random"]),
        "masked_loss": st.sampled_from([None, "alpha"]),
        "trigger_word": st.sampled_from([None, "sks"]),
    }
)


def place(path: Path, what: bytes | str) -> None:
    """Create an entry in the folder; reject examples with an invalid or existing name."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(what, bytes):
            path.write_bytes(what)
        elif what == "folder":
            path.mkdir()
        elif what == "pipe":
            os.mkfifo(path)
        else:
            targets = {"dangling": "nowhere.png", "loop": path.name, "linked folder": "..", "link": "/dev/null"}
            path.symlink_to(targets[what])
    except OSError:
        pass


def check(folder: Path, config: DataConfig) -> None:
    sheet = DataSheet(folder, [])
    try:
        picture = inspect_data(config, Frame(32, 16), sheet)
    except DataError as error:
        if "no column file_name" in str(error):
            return
    else:
        assert picture.width > 0
        assert sheet.entries
    describe_data(sheet).encode()
    told = json.loads(json.dumps(sheet.as_json()))
    assert sum(bucket["images"] for bucket in told["buckets"]) == told["images"] == len(told["files"])
    used = {each["name"] for each in told["files"]}
    left_out = {each["name"] for each in told["left_out"]}
    assert all(each["reason"] for each in told["left_out"])
    for directory, _, names in os.walk(folder):
        for path in (Path(directory, name) for name in names):
            name = str(path.relative_to(folder))
            if name in left_out or printable(name) in used or path.name.startswith("."):
                continue
            # What is left are captions of images, and the metadata file that was read.
            images = {str(path.relative_to(folder).with_suffix(suffix)) for suffix in SUFFIXES}
            caption = path.suffix == ".txt" and (images & left_out or {printable(each) for each in images} & used)
            assert caption or name in ("metadata.jsonl", "metadata.csv"), name


@given(FILES, METADATA, OPTIONS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_folder_is_read_or_its_faults_are_reported(
    files: dict[tuple[str, str], bytes | str], metadata: dict[str, list[str]], options: dict[str, object]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "data"
        folder.mkdir()
        for (stem, suffix), what in files.items():
            place(folder / f"{stem}{suffix}", what)
        for file, rows in metadata.items():
            place(folder / file, "\n".join(rows).encode())
        check(folder, DataConfig.model_validate({"data": folder, **options}))


@pytest.mark.parametrize("file", ["metadata.jsonl", "metadata.csv"])
def test_every_faulty_row_is_named_and_the_others_are_used(tmp_path: Path, file: str) -> None:
    (tmp_path / "a.png").write_bytes(GOOD)
    good = '{"file_name": "a.png", "text": "a"}' if file.endswith("l") else "file_name,text\na.png,a"
    for row in ROWS[1:]:
        (tmp_path / file).write_text(f"{good}\n{row}")
        sheet = DataSheet(tmp_path, [])
        inspect_data(DataConfig(data=tmp_path), Frame(16, 16), sheet)
        extra = row in ("", "a.png,a") if file.endswith("v") else row == ""
        assert len(sheet.entries) == 1 + (extra and bool(row)), row[:80]
        assert len(sheet.faults) == (not extra), row[:80]
        assert all(file in each.name for each in sheet.faults)


@pytest.mark.parametrize("name", sorted(CONTENTS))
def test_each_kind_of_file_is_used_or_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "good.png").write_bytes(GOOD)
    (tmp_path / "odd.png").write_bytes(CONTENTS[name])
    sheet = DataSheet(tmp_path, [])
    inspect_data(DataConfig(data=tmp_path, prompt="x"), Frame(16, 16), sheet)
    fine = name in ("png", "jpeg", "cmyk", "gif", "webp", "deep", "dot")
    assert [entry.name for entry in sheet.entries] == ["good.png", "odd.png"][: 1 + fine]
    assert [each.name for each in sheet.faults] == ([] if fine else ["odd.png"])


@pytest.mark.parametrize(
    ("what", "reason"),
    [("dangling", "is a broken link"), ("loop", "is a broken link"),
     ("pipe", "is not a regular file"), ("link", "is a broken link"),
     ("linked folder", "is a link to a folder, and such links are not followed")],
)  # fmt: skip
def test_what_is_no_file_is_named(tmp_path: Path, what: str, reason: str) -> None:
    (tmp_path / "good.png").write_bytes(GOOD)
    place(tmp_path / "odd.png", what)
    sheet = DataSheet(tmp_path, [])
    inspect_data(DataConfig(data=tmp_path, prompt="x"), Frame(16, 16), sheet)
    assert [(each.name, each.reason) for each in sheet.faults] == [("odd.png", reason)]


def test_files_that_may_not_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(GOOD)
    (tmp_path / "closed.png").write_bytes(GOOD)
    (tmp_path / "closed").mkdir()
    for path in ("closed.png", "closed"):
        (tmp_path / path).chmod(0)
    if os.access(tmp_path / "closed.png", os.R_OK):
        pytest.skip("this user may read every file")
    sheet = DataSheet(tmp_path, [])
    inspect_data(DataConfig(data=tmp_path, prompt="x"), Frame(16, 16), sheet)
    assert {each.name: "Permission denied" in each.reason for each in sheet.faults} == {
        "closed.png": True,
        "closed": True,
    }


def test_images_of_one_name_share_a_caption_and_both_are_used(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg"):
        (tmp_path / name).write_bytes(GOOD)
    (tmp_path / "a.txt").write_text("shared")
    sheet = DataSheet(tmp_path, [])
    inspect_data(DataConfig(data=tmp_path), Frame(16, 16), sheet)
    assert [(entry.name, entry.caption) for entry in sheet.entries] == [("a.jpg", "shared"), ("a.png", "shared")]
    assert sheet.duplicates == [["a.jpg", "a.png"]]
