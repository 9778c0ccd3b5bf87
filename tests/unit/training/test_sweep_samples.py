from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from restune_diffusion.training import TrainConfig, ValidationConfig, sweep
from restune_diffusion.training.callbacks import validation as module
from restune_diffusion.training.sweeps import run as sweep_run

MakeConfig = Callable[..., TrainConfig]


@pytest.mark.parametrize(("tuner", "starts"), [("skip", 1), (("skip", "text"), 2)])
def test_the_start_of_a_sweep_is_sampled_once_and_shown_as_the_base(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tuner: Any, starts: int
) -> None:
    generate, calls, columns = module.generate_samples, [], []
    draw = sweep_run.comparison

    def counted(*arguments: Any) -> list[Image.Image]:
        calls.append(arguments)
        return generate(*arguments)

    def shown(given: dict[str, Path], *arguments: Any) -> Path | None:
        columns.append(list(given))
        return draw(given, *arguments)

    monkeypatch.setattr(module, "generate_samples", counted)
    monkeypatch.setattr(sweep_run, "comparison", shown)
    validation = ValidationConfig(prompts=("a disc",), steps=1)
    text = {"text": {"rank": 2}} if "text" in tuner else {}
    settings = config(tuner=tuner, steps=1, batch_size=1, validation=validation, sweep="lr=1e-3,1e-2", **text)
    result = sweep(settings, verbose=False)
    names = [row.name for row in result.rows]
    assert len(calls) == starts + 2, "and each tuner's end"
    assert columns == [[*(["base"] if starts == 1 else []), *names]]
    first, second = (tmp_path / "out" / name / "samples" / "step-000000" / "00.png" for name in names)
    np.testing.assert_array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(second)))
