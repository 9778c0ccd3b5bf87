from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from restune_diffusion.cli.train import parse_train_options
from restune_diffusion.training import TrainConfig, read_config, train
from restune_diffusion.training.config import presets
from restune_diffusion.training.config.length.epochs import steps_of_epochs
from restune_diffusion.training.config.length.resolve import resolve_length, with_length
from restune_diffusion.training.config.length.rule import EpochsRule
from restune_diffusion.training.sweeps.grid import parse_sweep
from restune_diffusion.utils.errors import UsageError

MakeConfig = Callable[..., TrainConfig]
RULE = EpochsRule(epochs=30, at_least=100, at_most=600)
NEEDED = {"base": "b", "data": Path("d"), "output": Path("o")}
FLAGS = ("--base=b", "--data=d", "--output=o")


@pytest.fixture
def ruled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the preset `style` a rule for its length."""
    style = replace(presets.PRESETS["style"], length=RULE)
    for module in ("presets", "length.resolve", "train_config", "config_file"):
        name = f"restune_diffusion.training.config.{module}.PRESETS"
        monkeypatch.setattr(name, {**presets.PRESETS, "style": style})


def steps(config: TrainConfig, images: int = 24, repeats: int = 1, processes: int = 1) -> int:
    per_step = config.batch_size * config.gradient_accumulation_steps * processes
    return resolve_length(config, images=images, samples=images * repeats, images_per_step=per_step).steps


@pytest.mark.parametrize(
    ("epochs", "samples", "per_step", "expected"),
    [(10, 24, 1, 240), (10, 24, 4, 60), (1, 5, 4, 2), (3, 5, 4, 4), (0.5, 24, 4, 3), (0.1, 30, 1, 3), (1, 2, 16, 1)],
)
def test_epochs_are_as_many_steps_as_show_all_samples(
    epochs: float, samples: int, per_step: int, expected: int
) -> None:
    assert steps_of_epochs(epochs, samples, per_step) == expected


def test_epochs_count_repeats_accumulation_and_processes() -> None:
    config = TrainConfig(**NEEDED, epochs=10, batch_size=2, gradient_accumulation_steps=3)
    assert steps(config) == 40
    assert steps(config, repeats=5) == 200
    assert steps(config, repeats=5, processes=2) == 100


@pytest.mark.parametrize(("images", "expected"), [(4, 100), (24, 180), (60, 450), (100, 600), (1000, 600)])
def test_a_rule_is_bounded_in_steps_and_counts_an_image_once(images: int, expected: int) -> None:
    assert RULE.steps(images, images_per_step=4) == expected


@pytest.mark.parametrize("bounds", [(0, 1, 2), (1, 3, 2), (1, 0, 2)])
def test_a_rule_without_a_possible_length_is_refused(bounds: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="bounds in ascending order"):
        EpochsRule(*bounds)


@pytest.mark.usefixtures("ruled")
def test_a_preset_may_derive_its_steps_from_the_images_and_settings_win() -> None:
    config = TrainConfig(**NEEDED, preset="style")
    assert (steps(config), steps(config, images=100), steps(config, repeats=9)) == (180, 600, 180)
    assert steps(TrainConfig(**NEEDED, preset="style", steps=7)) == 7
    assert steps(TrainConfig(**NEEDED, preset="style", epochs=2)) == 12
    length = resolve_length(config, images=24, samples=24, images_per_step=4)
    assert length.origin == "preset style: 30 epochs, at least 100 and at most 600 steps"
    resolved = with_length(config, length)
    assert (resolved.steps, resolved.epochs) == (180, None)
    assert steps(resolved, images=999) == 180, "the resolved number holds for other data"
    assert presets.PRESETS["style"].describe().endswith("; 30 epochs, at least 100 and at most 600 steps")


def test_lengths_without_a_rule() -> None:
    assert steps(TrainConfig(**NEEDED)) == 2000
    for name, preset in presets.PRESETS.items():
        config = TrainConfig(**NEEDED, preset=name)
        assert preset.length == (steps(config) if isinstance(preset.length, int) else preset.length)


def test_steps_and_epochs_exclude_each_other_and_a_higher_source_replaces_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lengths(config: TrainConfig) -> tuple[Any, Any]:
        return config.steps, config.epochs

    both = "steps and epochs are both set"
    with pytest.raises(ValueError, match=both):
        TrainConfig(**NEEDED, steps=3, epochs=1)
    path = tmp_path / "run.yaml"
    path.write_text("base: b\ndata: d\noutput: o\npreset: quality\nsteps: 30\n")
    config = f"--config={path}"
    assert lengths(parse_train_options("", [config]).settings()) == (30, None)
    assert lengths(parse_train_options("", [config, "--epochs", "4"]).settings()) == (None, 4)
    assert lengths(parse_train_options("", [config, "--steps=5"]).settings()) == (5, None)
    assert lengths(read_config(path, epochs=2)) == (None, 2)
    path.write_text(path.read_text().replace("steps: 30", "epochs: 3"))
    assert lengths(parse_train_options("", [config, "--steps", "5"]).settings()) == (5, None)
    assert lengths(parse_train_options("", [config], defaults={"steps": 9}).settings()) == (None, 3)
    with pytest.raises(UsageError, match=both):
        parse_train_options("", [*FLAGS, "--steps", "5", "--epochs", "2"])


@pytest.mark.parametrize("given", [{}, {"steps": 9}, {"epochs": 1}])
@pytest.mark.parametrize("name", ["steps", "epochs"])
def test_a_sweep_may_vary_either(given: dict[str, Any], name: str) -> None:
    variants = parse_sweep(TrainConfig(**NEEDED, **given, sweep=f"{name}=2,3"))
    other = "epochs" if name == "steps" else "steps"
    assert [(getattr(each.config, name), getattr(each.config, other)) for each in variants] == [(2, None), (3, None)]


@pytest.mark.usefixtures("ruled")
def test_a_run_records_the_steps_of_its_rule_and_is_resumed_by_them(
    config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(config(preset="style", steps=None, epochs=1, tuner="skip", checkpoint_every=2))
    assert result.steps == 3, "6 images in batches of 2"
    assert "training    3 steps of 2 images = 1.0 epochs (--epochs 1)" in capsys.readouterr().out
    kept = read_config(result.path.parent / "config.yaml")
    assert (kept.steps, kept.epochs) == (3, None)
    assert train(kept.model_copy(update={"resume": True}), verbose=False).losses == ()
    again = config(preset="style", steps=None, epochs=1, tuner="skip", checkpoint_every=2, resume=True)
    assert train(again, verbose=False).losses == (), "the flags of before resume it too"
