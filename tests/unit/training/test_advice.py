from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from restune_diffusion.cli.run_demo import IMAGES, _recipe
from restune_diffusion.data.captions import find_examples
from restune_diffusion.data.data_sheet import DataSheet, Entry
from restune_diffusion.data.training_images import load_samples
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.training.advice import warnings_about
from restune_diffusion.training.advice.outline import RunOutline
from restune_diffusion.training.config.length.resolve import resolve_length
from restune_diffusion.training.config.presets import PRESETS

NEEDED = {"base": "b", "data": Path("d"), "output": Path("o")}
# The number of images that each preset is for: "from 20 to 200", "about 5"; the other two do not name one.
IMAGES_OF = {
    "style": (8, 24, 100, 200),
    "lora": (24, 100, 200),
    "subject": (5, 10),
    "low-memory": (100, 200),
    "quality": (100, 200),
}


def entries(images: int, caption: str = "", original: int = 512, size: int = 512) -> list[Entry]:
    return [
        Entry(f"{number}.png", caption or f"image {number}", (original, original), (size, size), 1, 1, b"")
        for number in range(images)
    ]


def warned(images: int, shown: list[Entry] | None = None, **settings: Any) -> list[str]:
    config = TrainConfig(**NEEDED, **settings)
    per_step = config.batch_size * config.gradient_accumulation_steps
    length = resolve_length(config, images=images, samples=images, images_per_step=per_step)
    return list(warnings_about(RunOutline(config, length.steps, images, images, per_step, shown or entries(images))))


@pytest.mark.parametrize(
    ("images", "settings", "start", "remedy"),
    [
        (8, {"epochs": 400}, "3200 steps show each of 8 images 400 times, which usually memorizes", "try --steps 928"),
        (5, {"steps": 10, "batch_size": 6}, "a step of 6 images is larger than the data set", "lower --batch-size"),
        (
            24,
            {"steps": 10, "lr_scheduler": "linear", "lr_warmup_steps": 10},
            "the warm-up of 10 steps lasts for the whole run",
            "lower --lr-warmup-steps",
        ),
        (24, {"learning_rate": 100}, "--learning-rate 100 with adamw usually diverges", "between 0.0001 and 0.005"),
        (24, {"learning_rate": 0.1}, "--learning-rate 0.1 with adamw usually diverges", "between 0.0001 and 0.005"),
        (24, {"learning_rate": 1e-8}, "--learning-rate 1e-08 with adamw learns almost nothing", "usual rates"),
        (
            24,
            {"optimizer": "lion", "learning_rate": 1e-2},
            "--learning-rate 0.01 with lion usually",
            "usual rates",
        ),
        (
            24,
            {"tuner": ("skip", "text"), "text_learning_rate": 1},
            "--text-learning-rate 1 with adamw usually diverges",
            "usual rates",
        ),
        (24, {"caption_dropout": 0.9}, "--caption-dropout 0.9 hides most captions", "0.1 is usual"),
        (1, {"steps": 10}, "there is one training image", "use 5 or more images of a subject"),
    ],
)
def test_what_usually_goes_wrong_is_named_with_its_remedy(
    images: int, settings: dict[str, Any], start: str, remedy: str
) -> None:
    (warning,) = warned(images, **settings)
    assert warning.startswith(start)
    assert remedy in warning


def test_images_and_captions_that_teach_something_else() -> None:
    (small,) = warned(30, entries(14) + entries(16, original=256))
    assert small.startswith("16 of 30 images are enlarged more than 1.5 times")
    assert warned(30, entries(15) + entries(15, original=256)) == [], "half of them"
    (same,) = warned(30, entries(30, "a watercolor"))
    assert same.startswith("all 30 images have the same caption")
    for settings in (
        {"trigger_word": "sks"},
        {"tuner": ("skip", "text")},
        {"preservation": "output", "class_prompt": "a dog"},
    ):
        assert warned(30, entries(30, "a dog"), **settings) == [], "a subject has one caption"
    assert warned(29, entries(29, "a dog")) == []


@pytest.mark.parametrize(("name", "images"), [(name, count) for name in PRESETS for count in IMAGES_OF[name]])
def test_the_presets_do_not_warn(name: Any, images: int) -> None:
    assert warned(images, preset=name) == []


@pytest.mark.parametrize(
    ("images", "settings"),
    [
        (24, {"preset": "style", "steps": 500}),
        (24, {"preset": "style", "steps": 400}),
        (24, {"learning_rate": 2e-4}),
        (24, {"tuner": "bypass", "learning_rate": 5e-3, "epochs": 80}),
        (5, {"preset": "subject", "steps": 400, "batch_size": 4, "learning_rate": 1e-3, "text_learning_rate": 5e-3}),
        (24, {"optimizer": "prodigy", "learning_rate": 1}),
        (24, {"optimizer": "lion", "learning_rate": 2e-5}),
    ],
)
def test_the_examples_of_the_docs_do_not_warn(images: int, settings: dict[str, Any]) -> None:
    assert warned(images, **settings) == []


@pytest.mark.parametrize("family", ["res", "bypass"])
def test_the_demo_does_not_warn(family: Any, tmp_path: Path) -> None:
    config = _recipe(family, tmp_path, 300, 0)
    sheet = DataSheet(IMAGES, [])
    for _ in sheet.watched(load_samples(find_examples(IMAGES), 64)):
        pass
    assert len(sheet.entries) == 24
    outline = RunOutline(config, 300, 24, 24, config.batch_size, sheet.entries)
    assert list(warnings_about(outline)) == []


def test_the_plan_and_the_log_show_the_warnings(
    config: Callable[..., TrainConfig],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    train(config(learning_rate=0.1, steps=1))
    shown = capsys.readouterr().out
    assert "training    1 step of 2 images" in shown
    assert "\nwarning     --learning-rate 0.1 with adamw usually diverges" in shown
    with caplog.at_level(logging.WARNING):
        train(config(learning_rate=0.1, steps=1, output=tmp_path / "other"), verbose=False)
    assert "--learning-rate 0.1 with adamw usually diverges" in caplog.text


@pytest.mark.parametrize(("held_out", "chance"), [(0, None), (1, 2), (3, 8), (4, None)])
def test_a_loss_of_few_held_out_images_says_little(held_out: int, chance: int | None) -> None:
    config = TrainConfig(**NEEDED, steps=200)
    found = list(warnings_about(RunOutline(config, 200, 24, 24, 1, entries(24), held_out)))
    assert bool(found) == (chance is not None)
    if found:
        assert f"happens by chance once in {chance} times; hold out 4 or more" in found[0]
