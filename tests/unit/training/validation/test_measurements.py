"""The record of measurements, and the settings that need one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from restune_diffusion.cli.train import parse_train_options
from restune_diffusion.training import TrainConfig
from restune_diffusion.training.validation.measurements import Measurement, Measurements
from restune_diffusion.utils.errors import UsageError

NEEDED: dict[str, Any] = {"base": "b", "data": Path("d"), "output": Path("o")}


def record(*values: float, name: str = "loss", lower: bool = True) -> Measurements:
    return Measurements(Measurement(name, 10 * number, value, lower) for number, value in enumerate(values))


def test_the_best_is_the_earliest_of_equal_ones() -> None:
    found = record(3.0, 1.0, 2.0, 1.0)
    assert found.best("loss") == Measurement("loss", 10, 1.0)
    assert found.since_best("loss") == 2
    highest = record(3.0, 5.0, 2.0, name="style", lower=False)
    assert highest.best("style") == Measurement("style", 10, 5.0, lower_is_better=False)
    assert highest.since_best("style") == 1


def test_a_measurement_that_is_not_finite_is_never_the_best_and_counts_against_patience() -> None:
    found = record(math.nan, 2.0, -math.inf, math.nan)
    assert found.best("loss") == Measurement("loss", 10, 2.0)
    assert found.since_best("loss") == 2
    assert record(math.nan, math.inf).best("loss") is None
    assert record(math.nan, math.inf).since_best("loss") == 2
    assert record().since_best("loss") == 0


def test_names_do_not_mix_and_a_repeated_step_replaces_its_value() -> None:
    found = record(3.0, 1.0)
    found.add(Measurement("drift", 10, 0.1))
    found.add(Measurement("loss", 10, 4.0))
    assert [entry.value for entry in found.named("loss")] == [3.0, 4.0]
    assert found.best("loss") == Measurement("loss", 0, 3.0)


def test_a_checkpoints_json_gives_the_same_record() -> None:
    found = record(1 / 3, math.pi, name="style", lower=False)
    again = Measurements.from_json(json.loads(json.dumps(found.as_json())))
    assert again.named("style") == found.named("style")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": "best"}, "keep best needs a measurement, but nothing is measured; hold out images with validation."),
        ({"patience": 3}, "patience needs a measurement, but nothing is measured; hold out images with validation."),
        (
            {"patience": 3, "best_by": "style", "validation": {"holdout": 4}},
            "patience goes by style, which is not measured; set best_by to validation_loss",
        ),
        ({"best_by": "style", "validation": {"holdout": 4}}, "best_by is for keep and patience; set keep to best or"),
        ({"validation": {"loss_every": 4}}, "validation.loss_every is for held-out images, but none are held out"),
        (
            {"validation": {"holdout": 0}},
            "validation.holdout = 0 is not valid; use a fraction between 0 and 1, a whole number",
        ),
        ({"validation": {"holdout": 1.0}}, "holdout = 1.0 is not valid"),
        ({"validation": {"holdout": -0.5}}, "holdout = -0.5 is not valid"),
    ],
)
def test_what_cannot_be_done_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**NEEDED, **settings)


@pytest.mark.parametrize(("given", "value"), [("0.1", 0.1), ("5", 5), ("held", Path("held")), (8, 8), (0.25, 0.25)])
def test_a_holdout_is_a_fraction_a_number_or_a_folder(given: Any, value: Any) -> None:
    holdout = TrainConfig(**NEEDED, validation={"holdout": given}, keep="best", patience=2).validation.holdout
    assert (holdout, type(holdout)) == (value, type(value))


def test_the_command_line_gives_the_sentence_alone() -> None:
    flags = ["--base=b", "--data=d", "--output=o"]
    for wrong, message in {
        "--validation.holdout=1.5": r"validation\.holdout = 1\.5 is not valid; use a fraction between 0 and 1",
        "--keep=best": r"keep best needs a measurement, but nothing is measured",
    }.items():
        with pytest.raises(UsageError, match=message):
            parse_train_options("", [*flags, wrong])
