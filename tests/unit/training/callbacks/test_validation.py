from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from restune_diffusion import RestuneStableDiffusionPipeline
from restune_diffusion.imaging.contact_sheet import labelled_grid
from restune_diffusion.training import TrainConfig, TrainResult, ValidationConfig, train

PROMPTS = ("a red disc", "a green disc")

GENERATE = """
import sys, torch
from restune_diffusion import RestuneStableDiffusionPipeline
base, tuner, output, *prompts = sys.argv[1:]
pipeline = RestuneStableDiffusionPipeline.from_pretrained(base)
pipeline.load_tuner_weights(tuner)
for number, prompt in enumerate(prompts):
    generator = torch.Generator("cpu").manual_seed(7)
    images = pipeline(prompt, num_inference_steps=3, guidance_scale=4.0, generator=generator).images
    images[0].save(f"{output}/{number:02d}.png")
"""


@pytest.fixture
def result(config: Callable[..., TrainConfig]) -> TrainResult:
    validation = ValidationConfig(prompts=PROMPTS, every=2, steps=3, guidance=4.0, seed=7)
    # a learning rate at which four steps visibly change the image
    return train(config(validation=validation, learning_rate=0.1, checkpoint_every=2), verbose=False)


def pixels(folder: Path, number: int = 0) -> np.ndarray:
    return np.asarray(Image.open(folder / f"{number:02d}.png"))


def test_the_last_samples_equal_those_of_a_new_process_with_the_file(
    result: TrainResult, base: Path, tmp_path: Path, script: Callable[..., object]
) -> None:
    process = script("-c", GENERATE, base, result.path, tmp_path, *PROMPTS)
    _, errors = process.communicate(timeout=300)  # type: ignore[attr-defined]
    assert process.returncode == 0, errors  # type: ignore[attr-defined]
    for number in range(2):
        np.testing.assert_array_equal(pixels(result.samples[-1], number), pixels(tmp_path, number))


def test_samples_during_training_equal_the_pipelines_with_that_checkpoint(result: TrainResult, base: Path) -> None:
    pipeline = RestuneStableDiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    checkpoint = result.path.parent / "checkpoint-000002" / "tuner.safetensors"
    for folder, tuner in zip(result.samples[:2], (None, checkpoint), strict=True):
        if tuner is not None:
            pipeline.load_tuner_weights(tuner)
        generator = torch.Generator("cpu").manual_seed(7)
        image = pipeline(PROMPTS[0], num_inference_steps=3, guidance_scale=4.0, generator=generator).images[0]
        np.testing.assert_array_equal(pixels(folder), np.asarray(image))


def test_samples_show_the_training(result: TrainResult) -> None:
    assert [folder.name for folder in result.samples] == ["step-000000", "step-000002", "step-000004"]
    start, middle, end = (pixels(folder).astype(int) for folder in result.samples)
    assert abs(start - middle).max() > 0
    assert abs(middle - end).max() > 0
    assert all((folder / "sheet.png").is_file() for folder in result.samples)
    assert not list(result.path.parent.glob(".*")), "nothing of the sampling is left behind"


def test_the_grid_holds_every_image_and_label() -> None:
    rows = [[Image.new("RGB", (16, 16), color) for color in row] for row in (("red", "lime"), ("blue", "black"))]
    sheet = labelled_grid(rows, ["a row", "a label that is far too long for one line"], ["base", "tuned"], cell=64)
    bare = labelled_grid(rows, ["", ""], ["", ""], cell=64)
    colors = {color for _, color in bare.getcolors() or []}
    frame = (200, 200, 200)
    assert colors == {(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255), frame}
    assert sum(color == (255, 0, 0) for color in bare.get_flattened_data()) == 64 * 64
    assert sheet.size == bare.size
    assert sheet.tobytes() != bare.tobytes()
