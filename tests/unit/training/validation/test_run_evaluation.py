"""The images on which the saved tuners of a run are evaluated."""

from __future__ import annotations

import numpy as np
from PIL import Image

from restune_diffusion.training import TrainConfig
from restune_diffusion.training.validation.run_evaluation import Overrides, examples_of_run


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
