"""The pictures to learn from: reading them, and laying them out in variants."""

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

# How often each stored variant of a picture is shown: as drawn, shifted, smaller, on a colour.
VARIANT_WEIGHTS = (0.5, 0.22, 0.14, 0.14)


@dataclass
class Icons:
    """All pictures (uint8 RGBA), with one record of captions and weight each."""

    pixels: Tensor
    records: list[dict[str, Any]]
    weights: Tensor

    def variants(self, index: int, seed: int) -> tuple[Tensor, list[int]]:
        """The variants of the picture at an index as a seed makes them, and their background colours."""
        return variants(self.pixels[index], torch.Generator().manual_seed(seed + index))


def load_icons(folder: Path) -> Icons:
    """Read what `prepare_icons.py` wrote."""
    pixels, records = [], []
    for name in PRETRAINING_SETS:
        pixels.append(torch.from_numpy(np.load(folder / f"{name}.npy", allow_pickle=False)))
        about = json.loads((folder / f"{name}.json").read_text())
        records += [icon | {"set": name, "style": about["style"]} for icon in about["icons"]]
    weights = torch.tensor([record["weight"] for record in records])
    return Icons(torch.cat(pixels), records, weights)


def on_background(rgba: Tensor, colour: Tensor) -> Tensor:
    """Lay N RGBA pictures (N, H, W, 4; bytes) over plain colours (N, 3; 0..1); the result is N, 3, H, W in -1..1."""
    picture = rgba.float().permute(0, 3, 1, 2) / 255
    alpha = picture[:, 3:]
    return (picture[:, :3] * alpha + colour[:, :, None, None] * (1 - alpha)) * 2 - 1


def shifted(rgba: Tensor, dy: int, dx: int) -> Tensor:
    """Move pictures by whole pixels, filling with transparency."""
    return torch.roll(F.pad(rgba, (0, 0, 8, 8, 8, 8)), (dy, dx), (1, 2))[:, 8:-8, 8:-8]


def smaller(rgba: Tensor, side: int) -> Tensor:
    """A picture shrunk into the middle of its frame."""
    image = Image.fromarray(rgba.numpy()).convert("RGBa").resize((side, side), Image.Resampling.LANCZOS)
    frame = Image.new("RGBA", (rgba.shape[1], rgba.shape[0]))
    frame.paste(image.convert("RGBA"), ((rgba.shape[1] - side) // 2, (rgba.shape[0] - side) // 2))
    return torch.from_numpy(np.array(frame))


def variants(rgba: Tensor, generator: torch.Generator) -> tuple[Tensor, list[int]]:
    """The variants of one picture (V, 3, H, W) and the index of each one's background colour."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    def moved(picture: Tensor, reach: int) -> Tensor:
        return shifted(picture[None], draw(-reach, reach), draw(-reach, reach))[0]

    shapes = [rgba, moved(rgba, 2), moved(smaller(rgba, draw(50, 60)), 3), rgba]
    colours = [0, 0, 0, draw(1, len(COLOURS) - 1)]
    palette = torch.tensor(list(COLOURS.values())) / 255
    return on_background(torch.stack(shapes), palette[colours]), colours
