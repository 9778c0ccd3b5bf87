"""A person without a terminal trains a tuner on the page, and no mishap loses the run."""

from __future__ import annotations

import json
import os
import re
import sys
from itertools import pairwise

import pytest

from restune_diffusion.run_queue import RunQueue
from restune_diffusion.storage.tuner_file import read_info

from ...studio_process import StudioProcess
from ...unit.studio.training.archives import huge_image, image_bytes, write_zip
from .train_page import TrainPage, end_queue, until, zip_of_icons

SHORT = """
preset: style
res: {width: 4}
batch_size: 2
validation: {prompts: ["red apple, ink style"], steps: 2, guidance: 1, every: 40}
checkpoint_every: 1000
"""


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    with StudioProcess(tmp_path_factory.mktemp("studio") / "home") as process:
        yield process
        end_queue(process.home)


@pytest.fixture(scope="module")
def icons(tmp_path_factory):
    further = {"notes.pdf": b"x", "huge.png": huge_image(), "huge.txt": b"x", "broken.png": b"\x89PNG broken"}
    return zip_of_icons(tmp_path_factory.mktemp("zips") / "ink icons.zip", 6, further)


def shoot(page, shots, name):
    for width in (390, 1440) if shots is not None else ():
        page.page.set_viewport_size({"width": width, "height": 900})
        page.page.screenshot(path=shots / f"train-{name}-{width}.png", full_page=True)


def metrics(run):
    lines = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


def test_a_dropped_zip_is_trained_to_the_end_over_a_reload_a_stop_and_a_resume(studio, open_page, icons, shots):
    opened = open_page(studio.url)
    page = TrainPage(opened.page)
    page.drop(icons)
    note = page.await_text("upload-note", "7 images stored in ink icons")
    assert "notes.pdf is not an image file" in note
    assert "huge.png has 200 megapixels, and the limit is 80" in note
    sheet = page.await_text("sheet", "6 to train on")
    assert "broken.png" in sheet

    page.type("trigger-word", "ink style")
    until(lambda: page.value("validation-prompts") == "red apple, ink style\ncat face, ink style", "suggested prompts")
    page.paste(SHORT + "steps: 300\nname: ink\ntrigger_word: ink style\n")
    page.await_text("read-note", "The form is filled")
    assert (page.value("steps"), page.value("name")) == ("300", "ink")
    page.await_text("memory", "Needs about")
    shoot(page, shots, "ready")
    page.start()
    until(lambda: page.step() > 2, "the run has begun")

    page.page.reload()
    page = TrainPage(page.page)
    assert "ink" in page.await_text("run", "running")
    # A reload cuts off the requests of the old page, which gradio reports.
    opened.errors[:] = [error for error in opened.errors if not re.search(r"aborted|Connection errored", error)]
    shoot(page, shots, "running")
    page.press("stop")
    page.await_text("run", "stopped")
    (run,) = RunQueue(studio.home / "queue").runs()
    stopped = metrics(run)[-1]
    assert 2 < stopped < 300
    assert [path.name for path in run.output.glob("checkpoint-*")] == [f"checkpoint-{stopped:06d}"]

    page.press("resume")
    page.await_text("run", "running")
    # The samples of every 40th step must not pass for those that are asked for.
    until(lambda: page.step() > stopped and page.step() % 40 in range(2, 26), "the run goes on")
    page.press("sample")
    page.await_text("run-note", "after the current step")
    page.await_text("run", "finished")
    until(lambda: page.page.locator("#train-library").is_visible(), "the tuner can be added")
    assert metrics(run) == list(range(1, 301))
    images = page.page.locator("#train-samples img")
    sampled = sorted(int(path.name[5:]) for path in (run.output / "samples").iterdir())
    assert images.count() == len(sampled) >= 4
    asked = [step for step in sampled if step % 40 and step not in (0, 300)]
    assert len(asked) == 1
    assert asked[0] > stopped
    images.first.scroll_into_view_if_needed()
    until(lambda: images.first.evaluate("image => image.naturalWidth") == 64, "the sample is loaded")
    shoot(page, shots, "finished")
    page.press("library")
    page.await_text("run-note", "ink is in the library")
    facts = read_info(studio.home / "tuners" / "ink.safetensors").training
    assert (facts["steps"], facts["images"], facts["trigger_words"]) == (300, 6, ["ink style"])


def test_three_runs_of_one_name_are_trained_one_after_the_other(studio, open_page, icons):
    page = TrainPage(open_page(studio.url).page)
    page.show("New run")
    page.paste(SHORT + f"steps: 2\nname: same\ndata: '{studio.home}/data/ink icons'\n")
    page.await_text("sheet", "6 to train on")
    queue = RunQueue(studio.home / "queue")
    before = len(queue.runs())
    for number in range(3):
        page.start()
        until(lambda count=number: len(queue.runs()) == before + count + 1, "the run is in the queue")
        page.show("New run")
    page.show("Runs")
    until(lambda: all(run.state == "finished" for run in queue.runs()), "all runs have finished")
    runs = queue.runs()[before:]
    assert [run.output.name for run in runs] == ["same", "same-2", "same-3"]
    assert all(earlier.ended <= later.started for earlier, later in pairwise(runs))
    until(lambda: page.text("runs").count("finished") == before + 3, "the page shows their end")


def test_captions_are_changed_in_the_table_and_saved(studio, open_page, tmp_path):
    page = TrainPage(open_page(studio.url).page)
    page.drop(
        write_zip(
            tmp_path / "cats.zip", {"a_big-cat.png": image_bytes(), "b.png": image_bytes("blue"), "b.txt": b"old"}
        )
    )
    page.await_text("sheet", "1 image without one")
    page.page.locator("#train-use-names").click()
    page.fold("Change all captions at once")
    page.type("find", "old")
    page.type("replace", "new")
    until(lambda: "a big cat" in page.text("captions"), "the name of the file is the caption")
    page.page.locator("#train-replace-all").click()
    until(lambda: "new" in page.text("captions"), "the text is replaced")
    page.type("prefix", "ink style")
    page.page.locator("#train-add-prefix").click()
    until(lambda: "ink style, new" in page.text("captions"), "the words are in front")
    page.page.locator("#train-save-captions").click()
    page.await_text("caption-note", "2 captions saved")
    folder = studio.home / "data" / "cats"
    assert (folder / "a_big-cat.txt").read_text() == "ink style, a big cat"
    assert (folder / "b.txt").read_text() == "ink style, new"


def test_what_cannot_be_used_is_answered_by_a_sentence(studio, open_page, tmp_path):
    page = TrainPage(open_page(studio.url).page)
    folders = {path.name for path in (studio.home / "data").iterdir()}
    page.drop(write_zip(tmp_path / "evil.zip", {"../../evil.png": image_bytes()}))
    page.page.get_by_text("leads out of its folder; nothing was unpacked").wait_for()
    assert {path.name for path in (studio.home / "data").iterdir()} == folders
    page.paste("restune train --stepz 3")
    page.page.get_by_text("--stepz is not an option of restune train; did you mean --steps?").wait_for()
    page.paste("restune train --data /etc --steps 3")
    page.page.get_by_text("'/etc' is outside the folders of the studio").wait_for()
    page.page.locator("#train-start").click()
    page.page.get_by_text("Choose images first").first.wait_for()
    page.paste("tuner: [bypass]\nsteps: 7\nlearning_rate: 0.5\n")
    until(lambda: page.value("steps") == "7", "the form is filled")
    assert "--steps 7 --tuner bypass --learning-rate 0.5" in until(lambda: page.value("command"), "the command")
    page.fold("More settings")
    page.page.locator("#train-bypass-ratio").wait_for(state="visible")
    page.page.locator("#train-res-width").wait_for(state="hidden")


@pytest.mark.skipif(sys.platform == "win32", reason="kills processes as a Unix system does")
def test_a_killed_studio_leaves_the_run_alone_and_two_browsers_see_it_in_the_next(tmp_path, open_page, icons):
    home = tmp_path / "home"
    with StudioProcess(home) as first:
        opened = open_page(first.url)
        page = TrainPage(opened.page)
        page.drop(icons)
        page.await_text("sheet", "6 to train on")
        page.paste(SHORT + "steps: 5000\nname: long\n")
        page.await_text("read-note", "The form is filled")
        page.start()
        until(lambda: page.step() > 0, "the run has begun")
        opened.page.close()
        (run,) = RunQueue(home / "queue").runs()
        first.kill()
    try:
        before = metrics(run)[-1]
        until(lambda: metrics(run)[-1] > before, "the run goes on without a studio")
        os.kill(run.pid, 0)
        with StudioProcess(home) as second:
            pages = [TrainPage(open_page(second.url).page) for _ in range(2)]
            for page in pages:
                assert "long" in page.await_text("run", "running")
                until(lambda page=page: page.step() > before, "the page shows the run")
            assert RunQueue(home / "queue").get(run.id).pid == run.pid
            pages[0].press("stop")
            for page in pages:
                page.await_text("run", "stopped")
            pages[1].press("remove")
            for page in pages:
                page.await_text("run", "No run yet")
                page.page.close()
        assert list(run.output.glob("checkpoint-*"))
    finally:
        end_queue(home)
