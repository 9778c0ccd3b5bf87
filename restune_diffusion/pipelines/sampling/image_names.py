"""Names of generated images: `00-seed0.png`, numbered on in a folder."""

from __future__ import annotations

import re
from pathlib import Path

_NUMBER = re.compile(r"(\d+)-seed\d+")


def image_name(number: int, seed: int) -> str:
    """Return the name of the PNG file of an image."""
    return f"{number:02d}-seed{seed}.png"


def next_number(folder: Path) -> int:
    """Return the first number for new images in a folder, after those of its images `00-seed0.png`, `01-seed0.png`."""
    names = (path.name for path in folder.glob("*.png"))
    return 1 + max((int(match[1]) for name in names if (match := _NUMBER.match(name))), default=-1)


def free_path(path: Path) -> Path:
    """Return a path that does not exist: the given one, or the same with a number, as in `grid-2.png`."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free
