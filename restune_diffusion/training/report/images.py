"""Sample images as data URLs."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

_SIDE = 320


def data_url(path: Path) -> str | None:
    """Return an image as a data URL, downscaled if it is large, or None if it cannot be read."""
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None  # being written, or damaged
    small = max(image.size) <= _SIDE // 2
    image.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    if small:
        image.save(file, format="PNG")
    else:
        image.save(file, format="JPEG", quality=88)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"


def chosen_steps(steps: list[int], most: int) -> list[int]:
    """Return at most `most` steps, evenly spaced, including the first and the last."""
    if len(steps) <= most:
        return steps
    return [steps[round(number * (len(steps) - 1) / (most - 1))] for number in range(most)]
