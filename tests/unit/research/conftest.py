import json

import numpy as np
import pytest
from transformers import CLIPTokenizer

from research.restune_tiny.icon_sources import PRETRAINING_SETS
from tests.conftest import TINY_BASE

NAMES = ("apple", "red heart", "sun", "house")


def picture(number, style):
    """Return a 64 px RGBA image: names differ in position and hue, styles in shape."""
    x, y = np.meshgrid(np.arange(64), np.arange(64))
    dx, dy = np.abs(x - 24 - 5 * number), np.abs(y - 36 + 3 * number)
    distance = [dx + dy, np.maximum(dx, dy), np.hypot(dx, dy), dx + 2 * dy, 2 * dx + dy][style]
    pixels = np.zeros((64, 64, 4), dtype=np.uint8)
    pixels[distance < 18] = [60 * number, 200 - 40 * style, 40 + 50 * number, 255]
    pixels[(distance >= 18) & (distance < 20)] = [20, 20, 20, 128]
    return pixels


@pytest.fixture(scope="session")
def icons(tmp_path_factory):
    """Five synthetic pretraining sets in the format of `prepare_icons.py`."""
    folder = tmp_path_factory.mktemp("icons")
    for style, name in enumerate(PRETRAINING_SETS):
        np.save(folder / f"{name}.npy", np.stack([picture(number, style) for number in range(len(NAMES))]))
        described = [
            {"name": text, "label": text, "captions": [text, f"big {text}"], "tags": ["round"], "weight": 1.0 + number}
            for number, text in enumerate(NAMES)
        ]
        (folder / f"{name}.json").write_text(json.dumps({"style": f"{name} style", "icons": described}))
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    return CLIPTokenizer.from_pretrained(TINY_BASE / "tokenizer")
