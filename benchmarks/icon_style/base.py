"""Classify samples of the base."""

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
from .judges import Judges
from .runner import Settings, read_strip
from .sampling import ImageSampler
from .scores import kid, mean

SAMPLES = 60
CHUNK = 100
COMPARED = 100
"""Number of samples per style for the KID: the number that the benchmark scores for a tuner."""


def base_prompts(data: IconData, seed: int = 0) -> list[tuple[str, str]]:
    """Return every pretraining concept with one of its styles, in random order."""
    rng = random.Random(seed)
    pairs = [
        (concept, rng.choice([name for name in PRETRAINING_SETS if concept in data.styles[name].concepts]))
        for concept in data.known
    ]
    rng.shuffle(pairs)
    return pairs


def judge_base(
    sampler: ImageSampler,
    data: IconData,
    judges: Judges,
    settings: Settings,
    work: Path,
    *,
    every: int = 1,
    inception: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """Generate every `every`-th concept and report the accuracy of the classifiers, with the true images as reference.

    Guidance away from a prompt uses the prompt without its style. With `inception` features, the KID of the samples
    in each of the base's own styles is reported too.
    Writes `base.json` and `base-samples.png`, the first 60 samples of the random order, uncurated. With another
    guidance than in the settings, the file names contain its values, for example `base-3-2-0.json`.
    """
    pairs = base_prompts(data)[::every]
    usual = ImageSampler(sampler.pipeline, settings.inference_steps, settings.guidance)
    guided = f"{sampler.guidance:g}-{sampler.away:g}-{sampler.rescale:g}"
    name = "base" if sampler == usual else f"base-{guided}"
    drawn = []
    for start in tqdm(range(0, len(pairs), CHUNK), desc="samples of the base", leave=False):
        part = pairs[start : start + CHUNK]
        path = work / "base-drawings" / f"{every}-{guided}-{start:05d}.png"
        if not path.exists():
            prompts = [data.styles[style].prompt(concept) for concept, style in part]
            images = sampler.generate(prompts, seed=1 + start // CHUNK, others=[concept for concept, _ in part])
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                to_images(torch.cat(list(images), dim=1)[None])[0].save(file, format="PNG")
        drawn.append(read_strip(path))
    images = torch.cat(drawn)
    true_images = torch.cat([data.styles[style].pixels([concept]) for concept, style in pairs])
    result = {
        "concepts": len(pairs),
        "steps": sampler.steps,
        "guidance": sampler.guidance,
        "guidance from the prompt without style": sampler.away,
        "guidance rescale": sampler.rescale,
        "base": recognized(judges, images, pairs),
        "true pictures": recognized(judges, true_images, pairs),
        "style accuracy by style": by_style(judges, images, pairs),
    }
    if inception is not None:
        result["KID x1000 by style"] = distances(inception, data, images, pairs, settings.reference)
    with atomic_write(work / f"{name}.json") as file:
        file.write(json.dumps(result, indent=1).encode())
    with atomic_write(work / f"{name}-samples.png") as file:
        sample_page(to_images(images[:SAMPLES])).save(file, format="PNG", optimize=True)
    (work / f"{name}-samples.json").write_text(json.dumps(pairs[:SAMPLES]))
    print(json.dumps(result, indent=1))
    return result


def recognized(judges: Judges, images: Tensor, pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Return top-1 and top-5 accuracy of the concepts and accuracy of the styles, over the pretraining styles."""
    ranks = judges.concept_ranks(images, [concept for concept, _ in pairs])
    found = judges.style_of(images)
    hits = [name == style for name, (_, style) in zip(found, pairs, strict=True)]
    return {"top1": mean(ranks < 1), "top5": mean(ranks < 5), "style_accuracy": mean([float(hit) for hit in hits])}


def by_style(judges: Judges, images: Tensor, pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Return the style accuracy of the prompts of each pretraining style."""
    found = judges.style_of(images)
    hits: dict[str, list[float]] = {name: [] for name in PRETRAINING_SETS}
    for name, (_, style) in zip(found, pairs, strict=True):
        hits[style].append(float(name == style))
    return {name: mean(values) for name, values in hits.items() if values}


def distances(
    inception: Callable[[Tensor], Tensor],
    data: IconData,
    images: Tensor,
    pairs: list[tuple[str, str]],
    reference: int,
) -> dict[str, dict[str, float]]:
    """Return the KID (x 1000) of samples in each of the base's styles, and of the true images of the same concepts.

    The KID in pretraining styles is the error of the base itself, from which a tuner for a new style starts.

    Args:
        inception: function to the features of N x 3 x 64 x 64 images in [0, 1].
        data: the icon sets.
        images: the samples, N x 3 x 64 x 64 in [0, 1].
        pairs: concept and style of each sample; the first `COMPARED` of a style are used.
        reference: number of reference images of other concepts per style.
    """
    found = {}
    for name in PRETRAINING_SETS:
        rows = [index for index, (_, style) in enumerate(pairs) if style == name][:COMPARED]
        concepts = [pairs[index][0] for index in rows]
        others = sorted(data.styles[name].concepts - set(concepts))
        random.Random(0).shuffle(others)
        known = inception(data.styles[name].pixels(others[:reference]))
        shown = {"drawn": images[rows], "true pictures": data.styles[name].pixels(concepts)}
        found[name] = {kind: kid(inception(part), known) for kind, part in shown.items()}
    return found


def sample_page(images: list[Image.Image], columns: int = 10, zoom: int = 2) -> Image.Image:
    """Return a grid of images, enlarged by an integer factor."""
    side = images[0].width * zoom + 4
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * side + 4, rows * side + 4), "white")
    for index, image in enumerate(images):
        large = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
        page.paste(large, (4 + side * (index % columns), 4 + side * (index // columns)))
    return page
