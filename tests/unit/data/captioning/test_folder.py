"""Caption files: what is written, kept, extended and refused, and how an interrupted job continues."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from restune_diffusion.data.captioning.folder import caption_folder, joined, run_captioner
from restune_diffusion.data.captioning.job import CaptionJob, Outcome
from restune_diffusion.data.captioning.progress import PROGRESS_FILE
from restune_diffusion.utils.errors import DataError


class Stopped(BaseException):
    """Stop of a job, as by Ctrl-C or a kill."""


class Counting:
    """Captioner that names the width of an image, counts its images, and may stop."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.seen = 0
        self.stop_after = stop_after

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        if self.stop_after is not None and self.seen >= self.stop_after:
            raise Stopped
        self.seen += len(images)
        return [f"width {image.width}" for image in images]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for number, name in enumerate(("a.png", "b.png", "b.jpg", "c.png", "sub/d.png", "a-masklabel.png")):
        Image.new("RGB", (10 + number, 8)).save(tmp_path / name)
    return tmp_path


def texts(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*.txt"))}


def caption(folder: Path, captioner: Counting | None = None, **settings) -> Outcome:
    outcome = Outcome()
    job = CaptionJob(folder, **{"batch_size": 2, **settings})
    caption_folder(job, lambda: captioner or Counting(), outcome, lambda number: None)
    return outcome


def test_each_image_gets_a_file_of_its_own(folder):
    outcome = caption(folder)
    # `b.txt` would be the caption of both images of this name.
    assert texts(folder) == {
        "a.txt": "width 10\n", "b.png.txt": "width 11\n", "b.jpg.txt": "width 12\n", "c.txt": "width 13\n",
        "sub/d.txt": "width 14\n",
    }  # fmt: skip
    assert (len(outcome.written), outcome.unchanged, outcome.refused) == (5, 0, [])
    assert not list(folder.rglob(".*"))


def test_captions_are_kept_unless_asked(folder):
    (folder / "a.caption").write_text("mine")
    (folder / "c.txt").write_text(" \n")
    captioner = Counting()
    outcome = caption(folder, captioner)
    assert (captioner.seen, outcome.unchanged) == (4, 1)
    assert (folder / "a.caption").read_text() == "mine"
    # An empty file has no caption to lose.
    assert texts(folder)["c.txt"] == "width 13\n"
    assert "a.txt" not in texts(folder)
    again = Counting()
    outcome = caption(folder, again)
    assert (again.seen, outcome.unchanged, outcome.written) == (0, 5, [])
    caption(folder, existing="overwrite")
    assert (folder / "a.caption").read_text() == "width 10\n"


@pytest.mark.parametrize("existing", ["skip", "overwrite", "append", "prepend", "add-line"])
def test_a_stopped_job_continues_where_it_was(folder, existing):
    (folder / "a.txt").write_text("old\n")
    with pytest.raises(Stopped):
        caption(folder, Counting(stop_after=2), existing=existing)
    done = texts(folder)
    assert len(done) == 3 if existing == "skip" else 2
    rest = Counting()
    outcome = caption(folder, rest, existing=existing)
    assert rest.seen == (2 if existing == "skip" else 3)
    assert outcome.unchanged == (3 if existing == "skip" else 2)
    expected = {"skip": "old", "overwrite": "width 10", "append": "old, width 10", "prepend": "width 10, old",
                "add-line": "old\nwidth 10"}[existing]  # fmt: skip
    assert texts(folder) == {
        "a.txt": f"{expected}\n", "b.png.txt": "width 11\n", "b.jpg.txt": "width 12\n", "c.txt": "width 13\n",
        "sub/d.txt": "width 14\n",
    }  # fmt: skip
    assert not (folder / PROGRESS_FILE).exists()


def test_a_job_with_other_settings_starts_at_the_beginning(folder):
    with pytest.raises(Stopped):
        caption(folder, Counting(stop_after=2), existing="overwrite", key="one")
    (folder / "a.txt").write_text("changed")
    caption(folder, existing="overwrite", key="two")
    assert texts(folder)["a.txt"] == "width 10\n"


def test_a_half_written_line_of_progress_is_ignored(folder):
    with pytest.raises(Stopped):
        caption(folder, Counting(stop_after=4), existing="append")
    progress = folder / PROGRESS_FILE
    progress.write_text(progress.read_text()[:-4])
    rest = Counting()
    caption(folder, rest, existing="append")
    assert rest.seen == 2
    # The caption of the image without a whole line is there and is not added twice.
    assert texts(folder)["b.jpg.txt"] == "width 12\n"


@pytest.mark.parametrize(
    ("before", "existing", "trigger", "after"),
    [
        ("", "append", "sks", "sks, new"),
        ("old", "append", "sks", "sks, old, new"),
        ("sks, old", "append", "sks", "sks, old, new"),
        ("sks, old", "prepend", "sks", "sks, new, old"),
        ("sks, new, old", "prepend", "sks", "sks, new, old"),
        ("old, new", "append", None, "old, new"),
        ("old\n\nolder", "append", None, "old, new\nolder, new"),
        ("old", "add-line", "sks", "sks, old\nsks, new"),
        ("sks, old\nsks, new", "add-line", "sks", "sks, old\nsks, new"),
        ("old", "overwrite", None, "new"),
    ],
)
def test_a_new_caption_is_joined_to_the_old_one(before, existing, trigger, after):
    assert joined(before, "new", existing, trigger) == after


def test_images_that_cannot_be_captioned_are_listed(folder):
    (folder / "c.png").write_bytes(b"no image")
    (folder / "a.txt").write_bytes(b"\xff\xfe")

    def captioner(images: Sequence[Image.Image]) -> list[str]:
        return ["" if image.width == 11 else "x\0" if image.width == 12 else "  two\nlines " for image in images]

    outcome = Outcome()
    job = CaptionJob(folder, existing="append", batch_size=3)
    caption_folder(job, lambda: captioner, outcome, lambda number: None)
    assert {Path(each.name).name: each.reason for each in outcome.refused} == {
        "a.png": f"{folder / 'a.txt'} is not UTF-8 text; save it as UTF-8",
        "b.png": "got an empty caption; lower the thresholds, or write its caption by hand",
        "b.jpg": "has a caption with NUL characters; save it as UTF-8",
        "c.png": "is not an image of a known format",
    }
    assert texts(folder / "sub") == {"d.txt": "two lines\n"}
    assert (folder / "a.txt").read_bytes() == b"\xff\xfe"


def test_the_errors_of_a_captioner_are_one_sentence():
    image = Image.new("RGB", (8, 8))

    def failing(images: Sequence[Image.Image]) -> list[str]:
        raise KeyError("no\nsuch key")

    for captioner, reason in (
        (failing, r"The captioner failed \(KeyError\): '?no"),
        (lambda images: ["one", "two"], "returned 2 values for 1 images"),
        (lambda images: [1], "one string for each image"),
    ):
        with pytest.raises(DataError, match=reason):
            run_captioner(captioner, [image])
    with pytest.raises(MemoryError):
        run_captioner(lambda images: (_ for _ in ()).throw(MemoryError), [image])


def test_folders_whose_caption_files_are_not_read_are_refused(folder, tmp_path):
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "x"}))
    with pytest.raises(DataError, match=r"are in metadata\.jsonl, and caption files would not be read"):
        caption(folder)
    (folder / "metadata.jsonl").unlink()
    for name in ("state.json", "dataset_info.json"):
        (folder / name).write_text("{}")
    with pytest.raises(DataError, match="is a saved dataset"):
        caption(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no images"):
        caption(tmp_path / "empty")
    with pytest.raises(DataError, match="does not exist"):
        caption(tmp_path / "none")
    assert not texts(folder)
