from __future__ import annotations

import logging
from typing import Any

import pytest

from restune_diffusion.hooks.weights import TunerWeight, as_weight, schedule, warn_of_large


@pytest.mark.parametrize("weight", [50, -50, [1.0, 50], TunerWeight(50, steps=schedule("0-1: 1"))])
def test_a_weight_that_destroys_images_warns_and_names_the_tuner(
    weight: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_large("watercolor", as_weight(weight))
    assert caplog.messages == [
        "The weight 50 of the tuner watercolor is far beyond the usual range from 0 to 2; images usually fall apart."
    ]


@pytest.mark.parametrize("weight", [0, 1, -1, 5, 10, [1.0, 2.5], {"skip.*": 0.2}])
def test_usual_weights_do_not_warn(weight: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_large("watercolor", as_weight(weight))
    assert caplog.messages == []
