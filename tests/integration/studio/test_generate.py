"""The tab Generate in a browser: images, mixes, batches, grids, settings from an image, stop, errors, two people."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from restune_diffusion import SkipConfig, Tuner, save_tuner
from restune_diffusion.cli import main
from restune_diffusion.imaging.generation_record import a1111_text, png_chunks, read_record
from restune_diffusion.pipelines.load_base import load_placed
from restune_diffusion.storage.base_files.location import BUNDLED_BASE

from ...conftest import TWO_LEVELS, make_unet, randomize
from ...studio_process import StudioProcess

STEPS = 3
TIMEOUT = 20_000
playwright = pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def pipeline() -> Any:
    pipeline = load_placed(str(BUNDLED_BASE), "cpu", "fp32")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def home(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a studio with two tuners for the bundled base, and one for another."""
    home = tmp_path_factory.mktemp("generate") / "home"
    (home / "tuners").mkdir(parents=True)
    for seed, name in enumerate(("ink", "wool")):
        tuner = Tuner.for_pipeline(pipeline, SkipConfig(ratio=0.25))
        randomize(tuner, seed, std=0.15)
        save_tuner(tuner, home / "tuners" / f"{name}.safetensors")
    other = Tuner.for_base(make_unet(**TWO_LEVELS), SkipConfig(ratio=0.25))
    save_tuner(other, home / "tuners" / "stray.safetensors")
    return home


@pytest.fixture(scope="module")
def studio(home: Path) -> Iterator[StudioProcess]:
    with StudioProcess(home) as process:
        yield process


class Tab:
    """The tab Generate of one browser."""

    def __init__(self, page: Any, home: Path) -> None:
        self.page, self.home = page, home
        page.set_default_timeout(TIMEOUT)
        playwright.expect.set_options(timeout=TIMEOUT)
        page.get_by_role("tab", name="Generate").click()
        self.fill("prompt", "a fox")
        self.fill("steps", STEPS)
        self.page.locator("#gen-random input").uncheck()

    def field(self, name: str) -> Any:
        return self.page.locator(f"#gen-{name} textarea, #gen-{name} input:not([type=range])").first

    def fill(self, name: str, value: object) -> None:
        self.field(name).fill(str(value))
        self.field(name).blur()

    def choose(self, *names: str) -> None:
        for name in names:
            self.page.locator("#gen-tuners input").click()
            option = self.page.get_by_role("option", name=name, exact=True)
            try:
                option.click(timeout=3000)
            except playwright.TimeoutError:  # the list was refreshed when the tab was opened
                self.page.locator("#gen-tuners input").blur()
                self.page.locator("#gen-tuners input").click()
                option.click()
            self.page.keyboard.press("Escape")
        self.page.locator(".tuner-card", has_text=names[-1]).wait_for()

    def mode(self, label: str) -> None:
        self.page.get_by_label(label).check()

    def start(self) -> None:
        self.page.locator("#gen-run").click()

    def images(self, before: str = "") -> list[Path]:
        """Wait for the end of the generation and return its images."""
        state = self.page.locator("#gen-state p")
        playwright.expect(state).not_to_have_text(before)
        # The first image waits for the base.
        playwright.expect(state).to_have_text(re.compile("Saved in|Not generated"), timeout=3 * TIMEOUT)
        return [self.home / "images" / name for name in re.findall(r"[\w-]+\.png", state.inner_text())]

    def made(self) -> list[Path]:
        before = self.page.locator("#gen-state p").inner_text()
        self.start()
        return self.images(before)


@pytest.fixture
def tab(studio: StudioProcess, open_page: Any) -> Tab:
    return Tab(open_page(studio.url).page, studio.home)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def generated(folder: Path, *arguments: str | Path) -> Path:
    """Return the image of `restune generate`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.raises(SystemExit) as exited:
            main(["generate", "--base", str(BUNDLED_BASE), "--prompt", "a fox", f"--steps={STEPS}", "--device=cpu",
                  "--output", str(folder), *map(str, arguments)])  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    assert not exited.value.code
    (path,) = folder.iterdir()
    return path


def test_a_mix_is_the_image_of_the_command_line_and_comes_back_from_its_file(tab, tmp_path):
    tab.choose("ink", "wool")
    tab.fill("seed", 7)
    tab.fill("tuner-0-weight", 0.5)
    tab.page.locator("#gen-tuner-0-more > button").click()
    tab.fill("tuner-0-end", 50)
    tab.fill("tuner-0-sites", "skip.0-3")
    (mixed,) = tab.made()
    tuners = tab.home / "tuners"
    same = generated(
        tmp_path, "--tuner", f"{tuners}/ink.safetensors:0.5", tuners / "wool.safetensors", "--seed=7",
        "--tuner-sites", "ink: *=0, skip.0-3=1", "--tuner-schedule", "ink: 0-0.5: 1",
    )  # fmt: skip
    assert np.array_equal(pixels(mixed), pixels(same))
    assert read_record(mixed) == read_record(same)

    # Another form; the image that is dropped on it restores the first one.
    tab.page.reload()
    restored = Tab(tab.page, tab.home)
    restored.fill("prompt", "a cat")
    restored.fill("steps", 2)
    restored.page.locator("#gen-drop input[type=file]").set_input_files(mixed)
    restored.page.locator("#gen-notes", has_text=f"Settings of {mixed.name}").wait_for()
    assert restored.field("prompt").input_value() == "a fox"
    restored.page.locator("#gen-tuner-0-more > button").click()
    values = [restored.field(name).input_value() for name in ("seed", "steps", "tuner-0-weight", "tuner-0-end")]
    assert values == ["7", str(STEPS), "0.5", "50"]
    assert restored.field("tuner-0-sites").input_value() == "skip.0-3"
    (again,) = restored.made()
    assert np.array_equal(pixels(again), pixels(mixed))


def test_a_batch_has_an_image_for_each_tuner_and_all_styles_leave_out_what_does_not_fit(tab, tmp_path):
    tab.choose("wool")
    tab.fill("tuner-0-weight", 0.6)
    tab.mode("One prompt in all my styles")
    base, ink, wool = tab.made()
    state = tab.page.locator("#gen-state").inner_text()
    assert "stray was left out. " in state
    tuners = tab.home / "tuners"
    for number, (image, flags) in enumerate(
        [
            (base, []),
            (ink, ["--tuner", tuners / "ink.safetensors"]),
            (wool, ["--tuner", f"{tuners}/wool.safetensors:0.6"]),
        ]
    ):
        alone = generated(tmp_path / str(number), *flags)
        # A batch may round another way than a single image.
        assert np.abs(pixels(image) - pixels(alone)).max() <= 1
        assert read_record(image).facts["command"] == read_record(alone).facts["command"]
    assert np.abs(pixels(ink) - pixels(wool)).mean() > 2
    tab.choose("ink")
    tab.mode("An image for each chosen tuner")
    tab.page.locator("#gen-with-base input").uncheck()
    chosen = tab.made()
    assert [read_record(image).facts["tuners"][0]["name"] for image in chosen] == ["wool", "ink"]
    assert np.abs(pixels(chosen[0]) - pixels(wool)).max() <= 1


def test_a_grid_has_a_row_for_each_line_and_a_column_for_each_weight(tab):
    tab.choose("ink")
    tab.mode("Grid")
    tab.fill("prompt", "a fox\na cat")
    tab.fill("weights", "0.5, 1")
    (sheet,) = tab.made()
    grid = read_record(sheet).facts["grid"]
    assert [row["prompt"] for row in grid["rows"]] == ["a fox", "a cat"]
    assert [column["label"] for column in grid["columns"]] == ["base", "ink 0.5", "ink 1"]
    assert Image.open(sheet).width > 3 * 192


def test_stop_ends_at_the_next_step_and_a_preview_was_shown(tab):
    tab.fill("steps", 150)
    before = set((tab.home / "images").iterdir())
    tab.start()
    tab.page.locator("#gen-preview img").wait_for()
    tab.page.locator("#gen-stop").click()
    tab.page.locator("#gen-state", has_text="Stopped; no image is saved.").wait_for()
    assert set((tab.home / "images").iterdir()) == before
    tab.fill("steps", 2)
    (image,) = tab.made()
    assert image.exists()


def test_mistakes_are_sentences(tab, tmp_path):
    tab.fill("prompt", "")
    tab.start()
    toast = tab.page.get_by_test_id("toast-body")
    toast.filter(has_text="The prompt is empty; describe the image that you want.").wait_for()
    tab.fill("prompt", "a fox")
    tab.choose("stray")
    tab.start()
    toast.filter(has_text="stray: This tuner was made for a base with block_out_channels = [8, 16]").wait_for()
    assert "Traceback" not in toast.last.inner_text()
    missing = str(tmp_path / "missing")
    tab.field("base").fill(missing)
    tab.field("base").press("Enter")
    tab.start()
    toast.filter(has_text=missing).wait_for()


def test_two_people_at_once_get_their_own_images(studio, open_page, tmp_path):
    tabs = [Tab(open_page(studio.url).page, studio.home) for _ in range(2)]
    for name, tab in zip(("ink", "wool"), tabs, strict=True):
        tab.choose(name)
        tab.fill("steps", 12)
    for tab in tabs:
        tab.start()
    for name, tab in zip(("ink", "wool"), tabs, strict=True):
        (image,) = tab.images()
        facts = read_record(image).facts
        assert [each["name"] for each in facts["tuners"]] == [name]
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        path = studio.home / "tuners" / f"{name}.safetensors"
        assert np.array_equal(pixels(image), pixels(generated(tmp_path / name, "--tuner", path, "--steps=12")))


def test_an_image_of_a1111_fills_the_form_and_what_was_not_used_is_listed(tab, tmp_path):
    pairs = {"Steps": 4, "Sampler": "DPM++ 2M", "Schedule type": "Karras", "CFG scale": 6.5, "Seed": 99}
    text = a1111_text("a crown <lora:ink:0.4> <lora:gone:1>", "blurry", {**pairs, "Hires upscale": 2})
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png", pnginfo=png_chunks({}, text))
    tab.page.locator("#gen-drop input[type=file]").set_input_files(tmp_path / "other.png")
    notes = tab.page.locator("#gen-notes", has_text="Settings of other.png")
    notes.wait_for()
    assert "the tuner gone, which the library does not have" in notes.inner_text()
    assert "Hires upscale 2" in notes.inner_text()
    tab.page.locator("#gen-more > button").click()
    shown = [tab.field(name).input_value() for name in ("prompt", "negative", "seed", "guidance", "tuner-0-weight")]
    assert shown == ["a crown", "blurry", "99", "6.5", "0.4"]
    assert tab.field("scheduler").input_value() == "dpmpp_2m_karras"
