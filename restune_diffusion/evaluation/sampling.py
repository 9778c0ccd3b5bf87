"""Generate the images of an evaluation, each from noise that depends on its number alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..data.captions import find_examples
from ..data.example import Example
from ..data.training_images import Sample, load_samples
from ..pipelines.load_base import training_resolution
from ..utils.errors import DataError


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of every image.

    Attributes:
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        seed: seed of the first image; image i uses seed + i.
        batch_size: number of images generated in one batch.
    """

    steps: int = 20
    guidance: float = 4.0
    seed: int = 0
    batch_size: int = 16


def generate(pipeline: Any, prompts: Sequence[str], sampling: Sampling, what: str | None = None) -> list[torch.Tensor]:
    """Return an image of each prompt, 3 x H x W in uint8.

    Args:
        pipeline: pipeline to call, with its tuners.
        prompts: the prompts.
        sampling: settings of every image.
        what: what is generated, for the progress bar; no bar is shown without it.
    """
    images: list[Image.Image] = []
    starts = range(0, len(prompts), sampling.batch_size)
    for start in tqdm(starts, desc=f"Generating, {what}", disable=None if what is not None else True):
        batch = list(prompts[start : start + sampling.batch_size])
        images += pipeline(
            batch,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            # One CPU generator per image, so that the noise depends on neither batch size nor device.
            generator=[torch.Generator("cpu").manual_seed(sampling.seed + start + i) for i in range(len(batch))],
        ).images
    return [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images]


def load_images(pipeline: Any, examples: Sequence[Example]) -> list[Sample]:
    """Return examples scaled and cropped to the base's native size; images that cannot be read are skipped."""
    return list(load_samples(examples, training_resolution(pipeline, None)))


def read_images(pipeline: Any, folder: Path, limit: int | None = None, prompt: str | None = None) -> list[Sample]:
    """Return the images of a folder, scaled and cropped to the base's native size, with their captions.

    Args:
        pipeline: pipeline of the base.
        folder: folder of images in the format of a training folder.
        limit: maximum number of images; the first ones are used.
        prompt: caption of the images that have none.

    Raises:
        DataError: if there are fewer than two images, or captions are missing.
    """
    samples = load_images(pipeline, find_examples(folder, prompt)[:limit])
    if len(samples) < 2:
        raise DataError(f"An evaluation needs at least two images, but {folder} has {len(samples)}.")
    return samples


def as_bytes(sample: Sample) -> torch.Tensor:
    """Return the pixels of a sample in uint8."""
    return ((sample.pixels + 1) * 127.5).round().to(torch.uint8)
