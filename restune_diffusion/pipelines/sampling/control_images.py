"""Control images given as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_control_images(
    pipeline: Any, images: Sequence[str], sources: Sequence[str], size: tuple[int, int]
) -> dict[str, Any] | None:
    """Read condition images, or compute them from source images.

    Args:
        pipeline: pipeline with its tuners loaded.
        images: condition image files, `CONDITION=FILE`, or `FILE` if the tuners take only one condition.
        sources: image files in the same form, from which the named condition is computed.
        size: width and height of the generated images.

    Returns:
        Condition images keyed by condition; None if no image is given.

    Raises:
        ConditionError: if the name of a condition is missing, or a condition cannot be computed.
        DataError: if a file cannot be read.
    """
    from ...imaging.conditions import make_condition
    from ...imaging.image_files import fitted_image, open_image
    from ..control_images import condition_names

    if not images and not sources:
        return None
    names = condition_names(pipeline)
    control_images = {name: open_image(path) for name, path in (_split(entry, names) for entry in images)}
    for name, path in (_split(entry, names) for entry in sources):
        # Computed at the generated size, as in training: edges of a large photo would fade when it is reduced.
        control_images[name] = make_condition(name, fitted_image(open_image(path), size))
    return control_images


def _split(entry: str, names: Sequence[str]) -> tuple[str, Path]:
    """Split `CONDITION=FILE`; the file name may contain `=`."""
    from ...utils.errors import ConditionError

    name, equals, path = entry.partition("=")
    if equals and name in names:
        return name, Path(path)
    if len(names) != 1:
        known = ", ".join(names) or "none"
        raise ConditionError(f"{entry} has no condition; write CONDITION=FILE. The tuners take {known}.")
    return names[0], Path(entry)
