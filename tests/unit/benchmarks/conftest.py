import colorsys
import json

import numpy as np
import pytest
import torch

from benchmarks.icon_style.data import IconData
from research.restune_tiny.icon_sources import COMMON, DEVELOPMENT_SETS, PRETRAINING_SETS
from restune_diffusion.cli.run_demo import BASE
from restune_diffusion.pipelines.load_base import load_base

CONCEPTS = sorted(COMMON)[:104]


def shape(number, style):
    """Return a 64 px RGBA image: concepts differ in hue, size and position, styles in shape and outline."""
    side = np.arange(64)
    x, y = np.meshgrid(side, side)
    place = 24 + 16 * (number % 2), 24 + 16 * (number // 2 % 2)
    reach = 10 + number % 7
    dx, dy = np.abs(x - place[0]), np.abs(y - place[1])
    distance = [dx + dy, np.maximum(dx, dy), np.hypot(dx, dy)][style % 3]
    colour = np.array(colorsys.hsv_to_rgb(number / len(CONCEPTS), 0.9, 0.5 + 0.07 * style)) * 255
    image = np.zeros((64, 64, 4), dtype=np.uint8)
    image[distance < reach] = [*colour, 255]
    if style % 2:
        image[(distance >= reach) & (distance < reach + 2)] = [0, 0, 0, 255]
    return image


@pytest.fixture(scope="session")
def icons(tmp_path_factory):
    """Seven synthetic icon sets in the format of `prepare_icons.py`."""
    folder = tmp_path_factory.mktemp("icons")
    for style, name in enumerate((*PRETRAINING_SETS, *DEVELOPMENT_SETS)):
        np.save(folder / f"{name}.npy", np.stack([shape(number, style) for number in range(len(CONCEPTS))]))
        about = {"icons": [{"name": concept, "label": concept} for concept in CONCEPTS]}
        (folder / f"{name}.json").write_text(json.dumps(about))
    return IconData(folder, test=CONCEPTS[::8])


@pytest.fixture(scope="session")
def tiny_base():
    pipeline = load_base(str(BASE), torch.float32)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.requires_grad_(False)
    return pipeline
