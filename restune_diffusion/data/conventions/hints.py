"""Hints about settings that do not fit the data: numbered folders without repeats, bucketing without effect."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..config import DataConfig

_NUMBERED = re.compile(r"\d{1,6}_.+")


def data_hints(
    config: DataConfig, names: Iterable[str], sizes: Sequence[tuple[int, int]], resolution: int
) -> list[str]:
    """Return hints about the settings of the data, one line each.

    Args:
        config: settings of the data.
        names: training images, relative to the data folder.
        sizes: the buckets of the images.
        resolution: side of the square, in pixels.
    """
    hints = []
    parents = (config.folder.resolve().name, *(part for name in names for part in Path(name).parts[:-1]))
    folder = next((name for name in parents if _NUMBERED.fullmatch(name)), None)
    if folder is not None and not config.folder_repeats:
        repeats = folder.split("_")[0]
        hints.append(
            f"The folder {folder} is named as kohya's scripts expect; set --folder-repeats to repeat its images "
            f"{repeats} times in an epoch."
        )
    if config.bucketing and set(sizes) == {(resolution, resolution)}:
        hints.append(
            f"Bucketing has no effect: all images fall into the bucket of {resolution} x {resolution}. Leave out "
            f"--bucketing, or raise --resolution."
        )
    return hints
