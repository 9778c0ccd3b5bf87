"""The images of a command line that steer control tuners."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_control_images(
    pipeline: Any, images: Sequence[str], pictures: Sequence[str], size: tuple[int | None, int | None]
) -> dict[str, Any] | None:
    """Read condition images, or make them from pictures.

    Args:
        pipeline: a pipeline with its tuners loaded.
        images: files of condition images, `CONDITION=FILE`, or `FILE` where the tuners take only one condition.
        pictures: the same for pictures that a condition is to be made from, by the maker of its name.
        size: width and height of what will be drawn; the base's own where None.

    Returns:
        The condition images by the names of their conditions; None where there are none.

    Raises:
        ConditionError: if a name is missing, or a condition cannot be made.
        DataError: if a file cannot be read.
    """
    from PIL import Image, ImageOps

    from ...imaging.conditions import make_condition
    from ...pipelines.control_images import condition_names
    from ...pipelines.load_base import training_resolution

    if not images and not pictures:
        return None
    names = condition_names(pipeline)
    control_images = {name: _read(path) for name, path in (_split(entry, names) for entry in images)}
    native = training_resolution(pipeline, None)
    for name, path in (_split(entry, names) for entry in pictures):
        # Made at the size that is drawn, as in training: the edges of a large photo would fade when it is reduced.
        fitted = ImageOps.fit(_read(path), (size[0] or native, size[1] or native), Image.Resampling.LANCZOS)
        control_images[name] = make_condition(name, fitted)
    return control_images


def _split(entry: str, names: Sequence[str]) -> tuple[str, Path]:
    """Split `CONDITION=FILE`; the file may contain such a sign itself."""
    from ...utils.errors import ConditionError

    name, equals, path = entry.partition("=")
    if equals and name in names:
        return name, Path(path)
    if len(names) != 1:
        known = ", ".join(names) or "none"
        raise ConditionError(f"Say which condition {entry} is for, as CONDITION=FILE; the tuners take {known}.")
    return names[0], Path(entry)


def _read(path: Path) -> Any:
    from ...data.image_files import read_layer
    from ...utils.errors import DataError

    try:
        return read_layer(path)[0]
    except Exception as error:  # Pillow's decoders raise almost anything on a broken file
        raise DataError(f"{path} cannot be read as an image ({error}).") from error
