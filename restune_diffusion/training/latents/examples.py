"""Encode examples to a latent cache, a share in each process, and report the used and skipped images."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ...data.condition_source import ConditionSource
from ...data.data_sheet import DataSheet
from ...data.example import Example
from ...data.image_transform import ImageTransform
from ...data.training_images import load_samples
from ...pipelines.load_base import is_inpainting
from ...utils.errors import NoImageError
from ..processes import gather_objects
from .cache import Cache, build_cache
from .cache_shards import build_together


def encode_examples(
    accelerator: Accelerator,
    pipeline: Any,
    examples: Sequence[Example],
    folder: Path,
    resolution: int,
    transform: ImageTransform,
    conditions: ConditionSource | None = None,
) -> tuple[Cache | None, DataSheet]:
    """Return, on every process, the cache of the examples and the report of their images.

    Args:
        accelerator: accelerator of the run.
        pipeline: the base.
        examples: images and captions, the same on every process.
        folder: folder of the images, for the report.
        resolution: side of the square images in pixels.
        transform: crops of the images.
        conditions: source of the condition images.

    Returns:
        The cache, or None if no image can be used, and the report.
    """
    own = DataSheet(folder, [])

    def build(share: Sequence[Example]) -> Cache:
        samples = load_samples(share, resolution, conditions, preparation=transform, refused=own.refused)
        return build_cache(pipeline, own.watched(samples), is_inpainting(pipeline))

    cache: Cache | None = None
    with suppress(NoImageError):
        cache = build_together(accelerator, examples, build)
    sheet = DataSheet(folder, [])
    sheet.add(gather_objects(accelerator, [own]))
    return cache, sheet
