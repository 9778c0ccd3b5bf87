"""Images of the base and of tuners from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...utils.errors import UsageError
from ..context import StudioContext
from .shelf import Shelf

MOST_IMAGES, MOST_STEPS = 8, 150


@dataclass(frozen=True)
class Comparison:
    """Images by column: the base first, then each tuner; one row for each seed."""

    columns: tuple[str, ...]
    seeds: tuple[int, ...]
    images: tuple[tuple[Any, ...], ...]
    """Columns of PIL images."""


@dataclass(frozen=True)
class ComparisonSettings:
    """Settings of the images of a comparison."""

    prompt: str
    seed: int = 0
    count: int = 2
    steps: int = 20
    guidance: float = 7.5

    def check(self) -> None:
        """Raise `UsageError` if a setting is not allowed."""
        if not self.prompt.strip():
            raise UsageError("The prompt is empty; describe the image to generate.")
        for name, value, low, high in (
            ("seed", self.seed, 0, 2**63 - 1 - MOST_IMAGES),
            ("number of images", self.count, 1, MOST_IMAGES),
            ("number of steps", self.steps, 1, MOST_STEPS),
            ("guidance", self.guidance, 0, 50),
        ):
            if not low <= value <= high:
                raise UsageError(f"The {name} is {value}; use a number from {low} to {high}.")


def compare(
    context: StudioContext, shelf: Shelf, names: Sequence[str], settings: ComparisonSettings, *, with_base: bool = True
) -> Comparison:
    """Generate with the base alone and with each tuner alone, each seed from the same noise.

    Args:
        context: state of the studio; its pipeline is used and its tuners are as before afterwards.
        shelf: the library.
        names: names of the tuners.
        settings: settings of the images.
        with_base: whether the base alone is the first column.

    Raises:
        RestuneError: if a setting is not allowed, or a tuner cannot be used with the base.
    """
    import torch

    from ...conversion.convert import load_any

    settings.check()
    names = list(dict.fromkeys(names))
    paths = [shelf.library.usable(name).path for name in names]
    seeds = tuple(range(settings.seed, settings.seed + settings.count))
    with context.lock:
        pipeline = context.pipeline()
        before = pipeline.get_list_tuners()
        loaded: list[str] = []
        try:
            for number, path in enumerate(paths):
                tuner = load_any(path, base=context.base)
                pipeline.load_tuner_weights(tuner, f"library-comparison-{number}", weight=0.0)
                loaded.append(f"library-comparison-{number}")
            mixes: list[str | None] = [*([None] if with_base else []), *loaded]
            columns = []
            for mix in mixes:
                pipeline.set_tuners([mix] if mix else [])
                result = pipeline(
                    [settings.prompt] * len(seeds),
                    num_inference_steps=settings.steps,
                    guidance_scale=settings.guidance,
                    # On the CPU, so that the noise of a seed is the same on every device.
                    generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                )
                columns.append(tuple(result.images))
        finally:
            if loaded:
                pipeline.delete_tuners(loaded)
            if before:
                pipeline.set_tuners(list(before), list(before.values()))
    return Comparison((*(["Base"] if with_base else []), *names), seeds, tuple(columns))
