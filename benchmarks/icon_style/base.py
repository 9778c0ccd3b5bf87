"""Ask the classifiers what the base draws."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from research.restune_tiny.icon_sources import PRETRAINING_SETS
from restune_diffusion.utils.atomic_write import atomic_write

from .data import IconData, to_images
from .draw import Artist
from .judges import Judges
from .runner import Settings, read_strip
from .scores import kid, mean

SAMPLES = 60
CHUNK = 100
COMPARED = 100
"""Drawings of a style whose distance is measured: as many as the benchmark scores of a tuner."""


def base_prompts(data: IconData, seed: int = 0) -> list[tuple[str, str]]:
    """Every concept that the base was trained on with one of the styles that draw it, in random order."""
    rng = random.Random(seed)
    pairs = [
        (concept, rng.choice([name for name in PRETRAINING_SETS if concept in data.styles[name].concepts]))
        for concept in data.known
    ]
    rng.shuffle(pairs)
    return pairs


def judge_base(
    artist: Artist,
    data: IconData,
    judges: Judges,
    settings: Settings,
    work: Path,
    *,
    every: int = 1,
    inception: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """Draw every `every`-th concept and report how many the classifiers recognise; the true pictures beside them.

    What the artist draws away from is the prompt without its style. Where `inception` features are given, the KID of
    the drawings in each of the base's own styles is reported too.
    Writes `base.json` and `base-samples.png`, the first 60 drawings of the random order, uncurated; the files of an
    artist that is not guided as the settings say tell how it was, as in `base-3-2-0.json`.
    """
    pairs = base_prompts(data)[::every]
    usual = Artist(artist.pipeline, settings.inference_steps, settings.guidance)
    guided = f"{artist.guidance:g}-{artist.away:g}-{artist.rescale:g}"
    name = "base" if artist == usual else f"base-{guided}"
    drawn = []
    for start in tqdm(range(0, len(pairs), CHUNK), desc="drawings of the base", leave=False):
        part = pairs[start : start + CHUNK]
        path = work / "base-drawings" / f"{every}-{guided}-{start:05d}.png"
        if not path.exists():
            prompts = [data.styles[style].prompt(concept) for concept, style in part]
            pictures = artist.draw(prompts, seed=1 + start // CHUNK, others=[concept for concept, _ in part])
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                to_images(torch.cat(list(pictures), dim=1)[None])[0].save(file, format="PNG")
        drawn.append(read_strip(path))
    pictures = torch.cat(drawn)
    true_pictures = torch.cat([data.styles[style].pixels([concept]) for concept, style in pairs])
    result = {
        "concepts": len(pairs),
        "steps": artist.steps,
        "guidance": artist.guidance,
        "guidance from the prompt without style": artist.away,
        "guidance rescale": artist.rescale,
        "base": recognised(judges, pictures, pairs),
        "true pictures": recognised(judges, true_pictures, pairs),
        "style accuracy by style": by_style(judges, pictures, pairs),
    }
    if inception is not None:
        result["KID x1000 by style"] = distances(inception, data, pictures, pairs, settings.reference)
    with atomic_write(work / f"{name}.json") as file:
        file.write(json.dumps(result, indent=1).encode())
    with atomic_write(work / f"{name}-samples.png") as file:
        sample_page(to_images(pictures[:SAMPLES])).save(file, format="PNG", optimize=True)
    (work / f"{name}-samples.json").write_text(json.dumps(pairs[:SAMPLES]))
    print(json.dumps(result, indent=1))
    return result


def recognised(judges: Judges, pictures: Tensor, pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Top-1 and top-5 of the concepts and the accuracy of the styles, among the pretraining styles."""
    ranks = judges.concept_ranks(pictures, [concept for concept, _ in pairs])
    found = judges.style_of(pictures)
    hits = [name == style for name, (_, style) in zip(found, pairs, strict=True)]
    return {"top1": mean(ranks < 1), "top5": mean(ranks < 5), "style_accuracy": mean([float(hit) for hit in hits])}


def by_style(judges: Judges, pictures: Tensor, pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Style accuracy of each pretraining style's prompts."""
    found = judges.style_of(pictures)
    hits: dict[str, list[float]] = {name: [] for name in PRETRAINING_SETS}
    for name, (_, style) in zip(found, pairs, strict=True):
        hits[style].append(float(name == style))
    return {name: mean(values) for name, values in hits.items() if values}


def distances(
    inception: Callable[[Tensor], Tensor],
    data: IconData,
    pictures: Tensor,
    pairs: list[tuple[str, str]],
    reference: int,
) -> dict[str, dict[str, float]]:
    """KID (x 1000) of drawings in each of the base's styles, and of the artist's pictures of the same concepts.

    What is left in styles that it was trained on is how the base draws, which a tuner for a new style starts from.

    Args:
        inception: features of N x 3 x 64 x 64 pictures in [0, 1].
        data: the icon sets.
        pictures: the drawings, N x 3 x 64 x 64 in [0, 1].
        pairs: concept and style of each drawing; the first `COMPARED` of a style count.
        reference: how many pictures of other concepts the style is known by.
    """
    found = {}
    for name in PRETRAINING_SETS:
        rows = [index for index, (_, style) in enumerate(pairs) if style == name][:COMPARED]
        concepts = [pairs[index][0] for index in rows]
        others = sorted(data.styles[name].concepts - set(concepts))
        random.Random(0).shuffle(others)
        known = inception(data.styles[name].pixels(others[:reference]))
        shown = {"drawn": pictures[rows], "true pictures": data.styles[name].pixels(concepts)}
        found[name] = {kind: kid(inception(part), known) for kind, part in shown.items()}
    return found


def sample_page(images: list[Image.Image], columns: int = 10, zoom: int = 2) -> Image.Image:
    """Lay pictures side by side, enlarged by whole pixels."""
    side = images[0].width * zoom + 4
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * side + 4, rows * side + 4), "white")
    for index, image in enumerate(images):
        large = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
        page.paste(large, (4 + side * (index % columns), 4 + side * (index // columns)))
    return page
