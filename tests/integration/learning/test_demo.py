import json

import numpy as np
import pytest
import torch
from PIL import Image

from restune_diffusion import RestuneStableDiffusionPipeline, read_info
from restune_diffusion.cli.run_demo import BASE, IMAGES, STYLE, SUBJECTS, run_demo


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    run_demo(folder, steps=3)
    return folder


def cells(grid, row):
    """Return the three images of a row, cropped from the grid and resized to 64 px."""
    left, top, pitch = grid.width - 3 * 136, grid.height - len(SUBJECTS) * 136, 136
    boxes = [(left + pitch * column, top + pitch * row) for column in range(3)]
    return [np.asarray(grid.crop((x, y, x + 128, y + 128)))[::2, ::2] for x, y in boxes]


def test_the_grid_shows_what_the_saved_tuners_draw(output):
    grid = Image.open(output / "grid.png").convert("RGB")
    assert all(len(np.unique(image)) > 10 for row in range(len(SUBJECTS)) for image in cells(grid, row))
    pipe = RestuneStableDiffusionPipeline.from_pretrained(str(BASE), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompts = [f"{subject}, {STYLE}" for subject in SUBJECTS]
    for column, kind in enumerate((None, "res", "bypass")):
        if kind:
            pipe.load_tuner_weights(output / f"{kind}.safetensors")
            pipe.set_tuners(kind)
        generators = [torch.Generator().manual_seed(0) for _ in prompts]
        images = pipe(prompts, num_inference_steps=20, guidance_scale=4.0, generator=generators).images
        for row, image in enumerate(images):
            assert (np.asarray(image) == cells(grid, row)[column]).all(), (kind, row)


def test_the_subjects_are_not_among_the_training_images():
    captions = [json.loads(line)["text"] for line in (IMAGES / "metadata.jsonl").read_text().splitlines()]
    assert len(captions) == 24
    assert all(caption.endswith(f", {STYLE}") for caption in captions)
    assert not {f"{subject}, {STYLE}" for subject in SUBJECTS} & set(captions)


def test_the_files_tell_how_they_were_made(output):
    for kind in ("res", "bypass"):
        info = read_info(output / f"{kind}.safetensors")
        assert info.training["steps"] == 3
        assert info.training["images"] == 24
        assert [config.part for config in info.configs] == [kind]


def test_the_demo_can_be_run_again_in_the_same_folder(output):
    before = {kind: (output / f"{kind}.safetensors").stat().st_mtime_ns for kind in ("res", "bypass")}
    run_demo(output, steps=1, seed=1)
    assert all((output / f"{kind}.safetensors").stat().st_mtime_ns > time for kind, time in before.items())
