"""The images on which the saved tuners of a run are evaluated."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from restune_diffusion.training import TrainConfig
from restune_diffusion.training.validation.run_evaluation import Overrides, examples_of_run
from restune_diffusion.utils.errors import DataError


def test_a_run_on_generated_latents_is_evaluated_on_its_folder_of_held_out_images(tmp_path):
    held_out = tmp_path / "held out"
    held_out.mkdir()
    for number, name in enumerate(("cat", "dog")):
        Image.fromarray(np.full((64, 64, 3), 100 * number, np.uint8)).save(held_out / f"{name}.png")
        (held_out / f"{name}.txt").write_text(f"a {name}")
    config = TrainConfig(
        base="base", output=tmp_path / "out", teacher="ink.safetensors", teacher_prompts=("a fox",),
        validation={"holdout": held_out},
    )  # fmt: skip
    training, found = examples_of_run(config, Overrides())
    assert training == []
    assert [example.caption for example in found] == ["a cat", "a dog"]


def test_a_data_folder_that_holds_out_other_images_than_in_the_run_is_refused(tmp_path):
    folder, output = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    output.mkdir()

    def add(number: int) -> None:
        Image.fromarray(np.full((64, 64, 3), number, np.uint8)).save(folder / f"{number}.png")

    for number in range(4):
        add(number)
    config = TrainConfig(base="base", data=folder, prompt="a disc", output=output, validation={"holdout": 2})
    sides = [[{"name": each.path.name} for each in side] for side in examples_of_run(config, Overrides())]
    (output / "data.json").write_text(json.dumps({"files": sides[0], "held_out": sides[1]}))
    assert [[{"name": each.path.name} for each in side] for side in examples_of_run(config, Overrides())] == sides
    for number in range(4, 40):
        add(number)
    with pytest.raises(DataError, match=r"have changed since the run, and \d\.png would be trained on now"):
        examples_of_run(config, Overrides())
    assert examples_of_run(config, Overrides(data=folder))[0]
