"""Training images: reading the icons, and composing their variants."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from research.restune_tiny.icon_sources import PRETRAINING_SETS
from research.restune_tiny.palette import COLOURS

# Sampling weight of each stored variant of an image: original, shifted, smaller, on a color.
VARIANT_WEIGHTS = (0.5, 0.22, 0.14, 0.14)


@dataclass
class Icons:
    """All icon images (uint8 RGBA), with one record of captions and a weight for each."""

    pixels: Tensor
    records: list[dict[str, Any]]
    weights: Tensor

    def variants(self, index: int, seed: int) -> tuple[Tensor, list[int]]:
        """Return the variants of an image for a seed, and the indices of their background colors."""
        return variants(self.pixels[index], torch.Generator().manual_seed(seed + index))


def load_icons(folder: Path) -> Icons:
    """Read the icons written by `prepare_icons.py`."""
    pixels, records = [], []
    for name in PRETRAINING_SETS:
        pixels.append(torch.from_numpy(np.load(folder / f"{name}.npy", allow_pickle=False)))
        about = json.loads((folder / f"{name}.json").read_text())
        records += [icon | {"set": name, "style": about["style"]} for icon in about["icons"]]
    weights = torch.tensor([record["weight"] for record in records])
    return Icons(torch.cat(pixels), records, weights)


def on_background(rgba: Tensor, colour: Tensor) -> Tensor:
    """Return RGBA images (N, H, W, 4; bytes) over plain colors (N, 3; 0..1) as (N, 3, H, W) in -1..1."""
    image = rgba.float().permute(0, 3, 1, 2) / 255
    alpha = image[:, 3:]
    return (image[:, :3] * alpha + colour[:, :, None, None] * (1 - alpha)) * 2 - 1


def shifted(rgba: Tensor, dy: int, dx: int) -> Tensor:
    """Return images shifted by whole pixels, filled with transparency."""
    return torch.roll(F.pad(rgba, (0, 0, 8, 8, 8, 8)), (dy, dx), (1, 2))[:, 8:-8, 8:-8]


def smaller(rgba: Tensor, side: int) -> Tensor:
    """Return an image reduced to `side` pixels in the center of its frame."""
    image = Image.fromarray(rgba.numpy()).convert("RGBa").resize((side, side), Image.Resampling.LANCZOS)
    frame = Image.new("RGBA", (rgba.shape[1], rgba.shape[0]))
    frame.paste(image.convert("RGBA"), ((rgba.shape[1] - side) // 2, (rgba.shape[0] - side) // 2))
    return torch.from_numpy(np.array(frame))


def variants(rgba: Tensor, generator: torch.Generator) -> tuple[Tensor, list[int]]:
    """Return the variants of one image (V, 3, H, W) and the index of each background color."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    def moved(image: Tensor, reach: int) -> Tensor:
        return shifted(image[None], draw(-reach, reach), draw(-reach, reach))[0]

    shapes = [rgba, moved(rgba, 2), moved(smaller(rgba, draw(50, 60)), 3), rgba]
    colours = [0, 0, 0, draw(1, len(COLOURS) - 1)]
    palette = torch.tensor(list(COLOURS.values())) / 255
    return on_background(torch.stack(shapes), palette[colours]), colours
