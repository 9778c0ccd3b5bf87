"""Images of the benchmark: training, selection and test concepts of every style."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from research.restune_tiny.icon_sources import COMMON, DEVELOPMENT_SETS, PRETRAINING_SETS, SOURCES

CONCEPTS = Path(__file__).with_name("concepts.json")
WIDELY_DRAWN = 4
"""Minimum number of pretraining sets that contain a concept known to the base."""


class IconStyle:
    """All images of one icon set, by concept.

    Args:
        folder: folder written by `research/restune_tiny/prepare_icons.py --benchmark`.
        name: name of the set.
    """

    def __init__(self, folder: Path, name: str) -> None:
        about = json.loads((folder / f"{name}.json").read_text())
        self.name = name
        self.phrase: str = SOURCES[name].style
        self._rgba = np.load(folder / f"{name}.npy", allow_pickle=False)
        self._index: dict[str, int] = {}
        for index, icon in enumerate(about["icons"]):
            self._index.setdefault(icon["label"], index)

    @property
    def concepts(self) -> set[str]:
        """Concepts of the set."""
        return set(self._index)

    def pixels(self, concepts: list[str]) -> torch.Tensor:
        """Return the images of the concepts on white: N x 3 x 64 x 64, float32 in [0, 1]."""
        rgba = torch.from_numpy(self._rgba[[self._index[concept] for concept in concepts]]).float() / 255
        colour, alpha = rgba[..., :3], rgba[..., 3:]
        return (colour * alpha + 1 - alpha).permute(0, 3, 1, 2).contiguous()

    def prompt(self, concept: str) -> str:
        """Return the prompt for a concept in this style, in the form of the base's captions."""
        return f"{concept}, {self.phrase}"


@dataclass(frozen=True)
class Split:
    """Concepts of one style and seed: for training, for choosing learning rates, and the rest of the style."""

    tuning: list[str]
    selection: list[str]
    reference: list[str]


@dataclass(frozen=True)
class IconData:
    """The pretraining and development styles and the split of their concepts."""

    folder: Path
    test: list[str] = field(default_factory=lambda: json.loads(CONCEPTS.read_text())["test"])

    @cached_property
    def styles(self) -> dict[str, IconStyle]:
        """All seven styles by name."""
        return {name: IconStyle(self.folder, name) for name in (*PRETRAINING_SETS, *DEVELOPMENT_SETS)}

    @cached_property
    def known(self) -> list[str]:
        """Concepts known to the base: those of at least `WIDELY_DRAWN` pretraining sets, sorted."""
        drawn = [concept for name in PRETRAINING_SETS for concept in self.styles[name].concepts]
        return sorted(concept for concept in set(drawn) if drawn.count(concept) >= WIDELY_DRAWN)

    def split(self, style: str, seed: int, *, tuning: int = 24, selection: int = 48) -> Split:
        """Return the random split of one seed; no test concept is in its tuning and selection sets.

        Args:
            style: name of a development style.
            seed: seed of the split.
            tuning: number of tuning images, of common things as a user would choose.
            selection: number of images for choosing learning rates.
        """
        free = sorted((set(self.known) & self.styles[style].concepts) - set(self.test))
        common = [concept for concept in free if concept in COMMON]
        rng = random.Random(seed)
        drawn = rng.sample(common, tuning + selection)
        taken = set(drawn)
        return Split(drawn[:tuning], drawn[tuning:], [concept for concept in free if concept not in taken])


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """Convert a tensor N x 3 x H x W in [0, 1] to RGB images."""
    bytes_ = (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(each) for each in bytes_]


def to_pixels(images: list[Any]) -> torch.Tensor:
    """Convert RGB images of one size to a tensor N x 3 x H x W, float32 in [0, 1]."""
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255


def write_tuning_images(style: IconStyle, concepts: list[str], folder: Path) -> Path:
    """Write images and captions as a data folder for training, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for concept, image in zip(concepts, to_images(style.pixels(concepts)), strict=True):
        file_name = concept.replace(" ", "-") + ".png"
        image.save(folder / file_name)
        lines.append(json.dumps({"file_name": file_name, "text": style.prompt(concept)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder
