"""Transfer tasks with few images each, which the backbone was not trained on."""

from __future__ import annotations

import colorsys
import random
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.icon_style.data import IconData
from research.restune_tiny.icon_sources import DEVELOPMENT_SETS, PRETRAINING_SETS

from .backbone import shrink

COLOURED = 0.3
"""Threshold of the saturation of a colored pixel, and of the share of such pixels in an image with a color."""


@dataclass(frozen=True)
class LabeledImages:
    """N x 3 x S x S images in [0, 1] and N class numbers."""

    pixels: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Task:
    """Training images, validation images for choosing learning rates, and test images."""

    name: str
    classes: int
    train: LabeledImages
    validation: LabeledImages
    test: LabeledImages


def _gather(data: IconData, rows: list[tuple[str, str, int]], side: int) -> LabeledImages:
    """Return the images of (concept, style, class) rows with their classes."""
    pixels = torch.cat([data.styles[style].pixels([concept]) for concept, style, _ in rows])
    return LabeledImages(shrink(pixels, side), torch.tensor([label for *_, label in rows]))


def style_task(data: IconData, side: int, seed: int, shots: int = 12) -> Task:
    """Return the task to classify the style of an image, one of seven; tested on the test concepts in all styles."""
    styles = list(data.styles)
    drawn_by_all = set.intersection(*(data.styles[style].concepts for style in styles))
    free = random.Random(seed).sample(sorted(drawn_by_all - set(data.test)), 2 * shots)

    def part(concepts: list[str]) -> LabeledImages:
        return _gather(data, [(c, style, label) for c in concepts for label, style in enumerate(styles)], side)

    return Task("style", len(styles), part(free[:shots]), part(free[shots:]), part(data.test))


def novel_task(data: IconData, side: int, seed: int) -> Task:
    """Return the task to classify held-out concepts: four training styles, one for validation, two unseen for test."""
    concepts = data.test
    styles = random.Random(seed).sample(PRETRAINING_SETS, len(PRETRAINING_SETS))

    def part(names: list[str]) -> LabeledImages:
        return _gather(data, [(c, style, label) for style in names for label, c in enumerate(concepts)], side)

    return Task("novel", len(concepts), part(styles[1:]), part(styles[:1]), part(list(DEVELOPMENT_SETS)))


def colour_task(data: IconData, side: int, seed: int, shots: int = 16, style: str = "openmoji") -> Task:
    """Return the task to classify the main color of an image in an unseen style: red, yellow, green, blue, or none."""
    by_colour: dict[int, list[str]] = defaultdict(list)
    for concept in sorted(data.styles[style].concepts):
        by_colour[main_colour(data.styles[style].pixels([concept])[0])].append(concept)
    rows: dict[str, list[tuple[str, str, int]]] = defaultdict(list)
    usable = [concepts for _, concepts in sorted(by_colour.items()) if len(concepts) >= 3 * shots]
    for label, concepts in enumerate(usable):
        # The test is the same for every seed.
        random.Random(0).shuffle(concepts)
        rows["test"] += [(c, style, label) for c in concepts[2 * shots :][: 5 * shots]]
        pool = concepts[: 2 * shots]
        random.Random(seed).shuffle(pool)
        rows["train"] += [(c, style, label) for c in pool[:shots]]
        rows["validation"] += [(c, style, label) for c in pool[shots:]]
    train, validation, test = (_gather(data, rows[name], side) for name in ("train", "validation", "test"))
    return Task("colour", len(usable), train, validation, test)


def main_colour(pixels: Tensor) -> int:
    """Return 0 for an image (3 x S x S on white) without color, otherwise 1 + the most frequent sector of its hues."""
    ink = pixels.flatten(1).T[(pixels.min(0).values < 0.95).flatten()].tolist()
    sectors = [0] * 4
    for red, green, blue in ink:
        hue, saturation, _ = colorsys.rgb_to_hsv(red, green, blue)
        if saturation > COLOURED:
            # Red 340-30 degrees, yellow 30-75, green 75-165, blue and violet 165-340.
            degrees = (hue * 360 + 20) % 360
            sectors[sum(degrees >= edge for edge in (50, 95, 185))] += 1
    if sum(sectors) <= COLOURED * len(ink):
        return 0
    return 1 + max(range(4), key=sectors.__getitem__)


TASKS = {"style": style_task, "colour": colour_task, "novel": novel_task}
