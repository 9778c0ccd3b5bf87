"""Values of the tab Generate, as the settings of the command line, and back from the records of images."""

from __future__ import annotations

from pathlib import Path

import pytest

from restune_diffusion.imaging.generation_record import GenerationRecord, a1111_text
from restune_diffusion.pipelines.sampling.grid import GridSettings
from restune_diffusion.serving.library import TunerEntry
from restune_diffusion.studio.context import StudioSettings
from restune_diffusion.studio.generation.fields import (
    EACH,
    GRID,
    FormValues,
    TunerRow,
    moved_rows,
    sampling_settings,
)
from restune_diffusion.studio.generation.markup import card_html
from restune_diffusion.studio.generation.restore import restored
from restune_diffusion.utils.errors import UsageError

BASE = "./base"


@pytest.fixture
def entries(tmp_path: Path) -> dict[str, TunerEntry]:
    """Entries of a tuner, of one of the same file name in a folder, and of a LoRA file of another program."""
    families = {"ink": ("skip",), "runs/ink": ("res",), "pixel": ("lora",)}
    found = {}
    for name, family in families.items():
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode())
        found[name] = TunerEntry(name, path, "1", 3, 0.0, family)
    return found


def settings_of(values: FormValues, entries: dict[str, TunerEntry]) -> GridSettings:
    settings = sampling_settings(values, entries, StudioSettings(Path(), BASE, device="cpu"))
    assert isinstance(settings, GridSettings) == (values.mode == GRID)
    return settings  # type: ignore[return-value]


def test_rows_become_the_options_of_the_command_line(entries):
    rows = [TunerRow("pixel", 0.5, sites="mid"), TunerRow("ink", -0.25, 20, 100), TunerRow("runs/ink")]
    settings = settings_of(FormValues(BASE, prompt="a fox", tuners=rows, scheduler="euler"), entries)
    assert settings.tuner == (f"{entries['ink'].path}:-0.25", f"{entries['runs/ink'].path}:1")
    assert settings.lora == (f"{entries['pixel'].path}:0.5",)
    assert settings.tuner_schedule == ("ink: 0.2-1: 1",)
    assert settings.tuner_sites == ("pixel: *=0, mid=1",)
    weights = settings.weights()
    assert list(weights) == ["ink", "ink-2", "pixel"]
    assert weights["pixel"][1].sites == {"*": 0.0, "mid": 1.0}


def test_a_grid_has_the_lines_of_the_prompt_and_the_weights(entries):
    values = FormValues(BASE, mode=GRID, prompt="a fox\n\n a cat", tuners=[TunerRow("ink", 0.3)], weights="0.5, 1")
    settings = settings_of(values, entries)
    assert [prompt for prompt, _ in settings.rows()] == ["a fox", "a cat"]
    assert [label for label, _ in settings.columns()] == ["base", "ink 0.5", "ink 1"]
    own = settings_of(FormValues(BASE, mode=GRID, prompt="x", tuners=[TunerRow("ink", 0.3)]), entries)
    assert own.columns() == [("base", None), ("ink 0.3", {"ink": 0.3})]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": " "}, "The prompt is empty"),
        ({"tuners": [TunerRow("ink", 1, 50, 50)]}, "The tuner ink begins at 50 % of the steps and ends at 50 %"),
        ({"mode": GRID, "weights": "much"}, "The weights 'much' are not numbers"),
        ({"mode": GRID, "share_steps": 31}, "31 shared steps are more than the 30 steps"),
        ({"steps": 0}, "The field steps is not allowed to have this value"),
    ],
)
def test_a_wrong_value_is_one_sentence(entries, changes, sentence):
    with pytest.raises(UsageError) as refused:
        settings_of(FormValues(**{"base": BASE, "prompt": "a fox", **changes}), entries)
    assert sentence in str(refused.value)


def test_a_tuner_that_stays_chosen_keeps_its_settings():
    before = [TunerRow("a", 0.1), TunerRow("b", 0.2, 10, 20, "mid")]
    assert moved_rows(before, ["b", "c"]) == [before[1], TunerRow("c")]


def test_a_record_fills_the_form_and_the_rest_is_listed(entries):
    import hashlib

    digest = hashlib.sha256(b"runs/ink").hexdigest()
    listed = [{"file": "ink.safetensors", "sha256": digest, "weight": 0.5}, {"file": "gone.safetensors", "weight": 1}]
    command = (
        "restune generate --base=other '--prompt=a --b' --tuner ink.safetensors:0.5 gone.safetensors:1 --scheduler=lcm"
        " --tuner-schedule 'ink: 0.25-1: 1' --tuner-sites 'ink: *=0, mid=1' --init-image=photo.png"
    )
    facts = {"prompt": "a --b", "seed": 2**40, "steps": 7, "guidance": 3.0, "width": "wide", "height": 64}
    record = GenerationRecord({**facts, "base": {"name": "other"}, "tuners": listed, "command": command}, "")
    found = restored(record, FormValues(BASE, mode=EACH, images=5, negative_prompt="dull"), entries.values())
    values = found.values
    assert (values.prompt, values.negative_prompt, values.seed, values.steps) == ("a --b", "", 2**40, 7)
    assert (values.mode, values.images, values.height, values.width, values.scheduler) == ("mix", 1, 64, None, "lcm")
    # Of two files of one name, the one with the recorded content
    assert values.tuners == [TunerRow("runs/ink", 0.5, 25, 100, "mid")]
    assert found.notes == [
        "Not used: width wide.",
        "Not used: the tuner gone.safetensors, which the library does not have.",
        "The image was made with the base other; choose it if you have it.",
        "Not used: init image photo.png.",
    ]


def test_a_file_that_changed_is_mentioned(entries):
    facts = {"prompt": "x", "tuners": [{"file": "pixel.safetensors", "sha256": "0" * 64, "weight": 1}]}
    found = restored(GenerationRecord(facts, ""), FormValues(BASE), entries.values())
    assert found.notes == ["The tuner pixel is another version than the one that made the image."]


@pytest.mark.parametrize(
    "facts",
    [
        {"tuners": 3, "grid": [], "command": 5, "base": 1},
        {"tuners": [{"weight": "x", "file": None}], "command": "restune 'x", "seed": [], "grid": {"rows": [1]}},
        {"grid": {"rows": [{}], "settings": {"weights_of_columns": "x", "images": True}}, "steps": float("nan")},
        {"seed": -1, "guidance": 10**400, "prompt": {}},
    ],
)
def test_a_record_may_hold_anything(entries, facts):
    assert restored(GenerationRecord({"x": 1, **facts}, ""), FormValues(BASE), entries.values()).values.prompt == ""


def test_the_text_of_a1111_fills_the_form(entries):
    pairs = {"Steps": 4, "Sampler": "Euler a", "CFG scale": 6.5, "Seed": 99, "Size": "96x64", "Model": "dream"}
    text = a1111_text("a crown <lora:pixel:0.4>", "blurry", {**pairs, "Face restoration": "X"})
    found = restored(GenerationRecord({}, text), FormValues(BASE), entries.values())
    values = found.values
    assert (values.prompt, values.negative_prompt, values.scheduler) == ("a crown", "blurry", "euler_a")
    assert (values.width, values.height, values.guidance, values.tuners) == (96, 64, 6.5, [TunerRow("pixel", 0.4)])
    assert found.notes[0] == "The image was made with the base dream; choose it if you have it."
    assert found.notes[-1] == "Not used: Face restoration X."


@pytest.mark.parametrize("pairs", [{"Schedule type": "Karras"}, {"Schedule type": "slow"}, {"Sampler": "Warp"}])
def test_a_sampler_of_a1111_that_is_not_known_is_named(entries, pairs):
    text = a1111_text("a crown", "", {"Steps": 4, "Seed": 1, **pairs})
    found = restored(GenerationRecord({}, text), FormValues(BASE), entries.values())
    assert found.values.steps == 4
    (name,) = pairs.values()
    assert any(note.startswith("Not used: Sampler ") and name in note for note in found.notes)


def test_a_card_shows_untrusted_text_as_text():
    entry = TunerEntry("x", Path("x"), "1", 1, 0.0, ("skip",), trigger_words=("<b>",), title="<script>")
    html = card_html(entry, "x")
    assert "&lt;script&gt;" in html
    assert "<script>" not in html
    assert "&lt;b&gt;" in html


def test_an_image_that_would_fill_the_memory_is_refused(entries):
    assert settings_of(FormValues(BASE, prompt="a fox", width=2048), entries).width == 2048
    with pytest.raises(UsageError, match="The height of 100000000 pixels is too large; use 2048 at most"):
        settings_of(FormValues(BASE, prompt="a fox", height=10**8), entries)
