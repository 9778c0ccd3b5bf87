"""What the tab does without its page: every purpose gives a run that trains, and no path leads elsewhere."""

from __future__ import annotations

import json
import shutil

import pytest

from restune_diffusion.run_queue import RunQueue
from restune_diffusion.storage.base_files.location import BUNDLED_BASE
from restune_diffusion.storage.tuner_file import read_info
from restune_diffusion.studio.context import StudioContext, StudioSettings
from restune_diffusion.studio.training.desk import TrainingDesk
from restune_diffusion.studio.training.settings.purposes import Device, suggestion
from restune_diffusion.training import train
from restune_diffusion.utils.errors import RestuneError, UsageError

from ....conftest import ROOT

DEMO = ROOT / "restune_diffusion" / "assets" / "demo"
BASE = str(BUNDLED_BASE)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.setattr("restune_diffusion.run_queue.ensure_supervisor", lambda *_: 0)
    return TrainingDesk(StudioContext(StudioSettings(tmp_path / "home", BASE, device="cpu")))


@pytest.fixture
def icons(desk):
    folder = desk.workspace.data / "icons"
    folder.mkdir()
    for row in list(map(json.loads, (DEMO / "metadata.jsonl").read_text().splitlines()))[:4]:
        shutil.copy(DEMO / row["file_name"], folder)
    return str(folder)


def values_of(purpose, **changes):
    values = suggestion(purpose, BASE, 4, Device())
    names = {"name": "my tuner", "trigger_word": "", "text.tokens": "", "text.initializers": "", "class_prompt": ""}
    values |= {**names, "validation.prompts": "red apple", "validation.steps": 1}
    return {**values, **changes}


@pytest.mark.parametrize(
    ("purpose", "changes", "families", "triggers"),
    [
        ("style", {"trigger_word": "ink style"}, ["res"], ["ink style"]),
        ("subject", {"text.tokens": "<miu>", "text.initializers": "cat"}, ["skip", "text"], ["<miu>"]),
        ("control", {"trigger_word": "icon"}, ["control"], ["icon"]),
        ("low-memory", {"trigger_word": "ink"}, ["bypass"], ["ink"]),
    ],
)
def test_each_purpose_trains_images_without_captions(desk, icons, purpose, changes, families, triggers):
    values = values_of(purpose, steps=1, batch_size=1, gradient_accumulation_steps=1, **changes)
    planned = desk.plan(purpose, BASE, icons, values, {}, without=4)
    assert planned.problem == ""
    train(planned.config, verbose=False)
    info = read_info(planned.config.file)
    assert [part.part for part in info.configs] == families
    assert info.training["trigger_words"] == triggers
    assert (planned.config.output / "samples" / "step-000001" / "00.png").exists()


def test_images_without_captions_need_a_trigger_word(desk, icons):
    assert desk.inspect(icons, BASE, values_of("style")).without == 4
    planned = desk.plan("style", BASE, icons, values_of("style"), {}, without=4)
    assert "4 images have no caption" in planned.problem
    with pytest.raises(UsageError, match="4 images have no caption"):
        desk.start(planned)
    assert list(desk.workspace.runs.iterdir()) == []


def test_runs_of_one_name_get_folders_of_their_own(desk, icons):
    def start():
        return desk.start(desk.plan("style", BASE, icons, values_of("style", trigger_word="x"), {}, without=4))

    assert [start().output.name for _ in range(3)] == ["my tuner", "my tuner-2", "my tuner-3"]
    assert [run.state for run in RunQueue(desk.workspace.queue).runs()] == ["waiting"] * 3


def test_a_run_that_the_queue_refuses_leaves_no_folder(desk, icons):
    planned = desk.plan("style", BASE, icons, values_of("style", trigger_word="x"), {"init_tuner": "/none"}, without=4)
    shutil.rmtree(icons)
    with pytest.raises(RestuneError):
        desk.start(planned)
    assert list(desk.workspace.runs.iterdir()) == []


@pytest.mark.parametrize("path", ["/etc", "../runs", "", None])
def test_only_folders_of_the_studio_are_read(desk, path):
    with pytest.raises(UsageError):
        desk.inspect(path, BASE, values_of("style"))
    with pytest.raises(UsageError):
        desk.save_captions(path, {})


def test_only_uploaded_files_are_stored(desk, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    shutil.copytree(DEMO, tmp_path / "cache")
    assert desk.upload([str(tmp_path / "cache" / "fox.png")]).images == 1
    with pytest.raises(UsageError, match="outside the folders"):
        desk.upload([str(DEMO / "fox.png")])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"name": "\u00e9" * 120}, "The name of the tuner is too long for a file; choose a shorter one."),
        ({"name": " "}, ""),
        ({"resolution": "99968"}, "The resolution of 99968 pixels is too large; use 2048 at most."),
    ],
)
def test_values_that_the_system_cannot_take_are_one_sentence(desk, icons, changes, problem):
    assert (
        desk.plan("style", BASE, icons, values_of("style", trigger_word="x", **changes), {}, without=4).problem
        == problem
    )


@pytest.mark.parametrize("resolution", ["99968", "9" * 5000])
def test_thumbnails_do_not_fill_the_memory(desk, icons, resolution):
    with pytest.raises(UsageError, match="use 2048 at most"):
        desk.inspect(icons, BASE, values_of("style", resolution=resolution))
