"""Control images of one pipeline call: assign them to the active control tuners."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from ..hooks.manager import TunerManager
from ..hooks.mixing import Layout
from ..imaging.conditions import condition_to_tensor
from ..tuners import Part
from ..utils.errors import ConditionError

ConditionImage: TypeAlias = Image.Image | np.ndarray[Any, Any] | torch.Tensor
ConditionImages: TypeAlias = ConditionImage | Sequence[ConditionImage]
"""One condition image for all generated images, or a list with one per prompt.

Tensors are `(channels, height, width)` or a batch of these, arrays `(height, width, channels)` or a batch; both are
uint8, or floating point with values from 0 to 1.
"""
TunerImage: TypeAlias = ConditionImages | Mapping[str, ConditionImages | Mapping[str, ConditionImages]]
"""Images of the only condition, or a mapping from condition names to images, or from tuner names, if two tuners need
different images for conditions of the same name."""
TunerScale: TypeAlias = float | Mapping[str, float | Mapping[str, float]]
"""Factor on the residuals of all conditions, or factors by the same names as the images."""


@contextlib.contextmanager
def with_control_images(
    manager: TunerManager,
    names: Iterable[str],
    images: TunerImage | None,
    scale: TunerScale,
    layout: Layout | None,
) -> Iterator[None]:
    """Context manager that sets the condition images of the active control tuners.

    Args:
        manager: manager of the base's tuners.
        names: names of the active tuners.
        images: the images; None keeps those set by `TunerManager.set_conditions`.
        scale: factors on the residuals of the conditions.
        layout: layout of the batch, if known.

    Raises:
        ConditionError: if an active control tuner has no image, or an image is invalid or matches no condition.
    """
    loaded = {name: part for name in manager.names if (part := _control_part(manager, name)) is not None}
    parts = {name: loaded[name] for name in names if name in loaded and manager.enabled}
    if images is not None and not loaded:
        raise ConditionError("No loaded tuner takes a condition image; load a control tuner, or omit tuner_image.")
    with manager.conditions_kept():
        # With all control tuners disabled, the same call generates the images of the base.
        if images is not None and parts:
            _set_images(manager, parts, images, scale, layout)
        for name, part in parts.items():
            if not manager.has_conditions(name):
                raise ConditionError(
                    f"The tuner {name!r} needs an image for {' or '.join(map(repr, part.conditions))}; give one as "
                    "tuner_image, or give the tuner no weight."
                )
        yield


def condition_names(pipeline: Any) -> list[str]:
    """Return the names of the conditions of a pipeline's active tuners."""
    manager = TunerManager.of(pipeline.unet)
    if manager is None:
        return []
    parts = (_control_part(manager, name) for name in manager.active_names)
    return list(dict.fromkeys(condition for part in parts if part is not None for condition in part.conditions))


def _set_images(
    manager: TunerManager,
    parts: Mapping[str, Part],
    images: TunerImage,
    scale: TunerScale,
    layout: Layout | None,
) -> None:
    """Set the images of every control tuner; a tuner without new images keeps its current ones."""
    slots = {name: part.conditions for name, part in parts.items()}
    shares = shares_of(images, slots)
    scales = shares_of(scale, slots) if isinstance(scale, Mapping) else {}
    for name, share in shares.items():
        part = parts[name]
        tensors = {
            condition: condition_tensor(condition, image, part.channels, layout) for condition, image in share.items()
        }
        default = 1.0 if isinstance(scale, Mapping) else scale
        weights = [float(scales.get(name, {}).get(condition, default)) for condition in part.conditions]
        manager.set_conditions(name, [tensors.get(condition) for condition in part.conditions], weights)


def _control_part(manager: TunerManager, name: str) -> Part | None:
    return next((part for part in manager.tuner(name).parts() if part.conditions), None)


def shares_of(given: Any, slots: Mapping[str, tuple[str, ...]]) -> dict[str, dict[str, Any]]:
    """Return the given values by tuner and condition.

    Args:
        given: one value for the only condition, or a mapping by names of conditions or tuners.
        slots: names of the conditions of each tuner.
    """
    conditions = list(dict.fromkeys(condition for names in slots.values() for condition in names))
    if not isinstance(given, Mapping):
        if len(conditions) > 1:
            named = ", ".join(f"{condition!r}: ..." for condition in conditions)
            raise ConditionError(f"The active tuners take several conditions; give a mapping by name: {{{named}}}.")
        return {name: dict.fromkeys(names, given) for name, names in slots.items()}
    shares: dict[str, dict[str, Any]] = {}
    # Tuner names are more specific than condition names and take precedence.
    for key, value in sorted(given.items(), key=lambda item: item[0] not in slots):
        if key in slots:
            shares.setdefault(key, {}).update(shares_of(value, {key: slots[key]})[key])
        elif key in conditions:
            for name in (name for name, names in slots.items() if key in names):
                shares.setdefault(name, {}).setdefault(key, value)
        else:
            raise ConditionError(f"No active tuner has a condition {key!r}; available: {', '.join(conditions)}.")
    return shares


def condition_tensor(name: str, images: ConditionImages, channels: int, layout: Layout | None) -> torch.Tensor:
    """Convert condition images to one tensor `(images, channels, height, width)` with values from 0 to 1."""
    listed: Sequence[Any] = images if isinstance(images, list | tuple) else [images]
    batches = [_batch(name, image, channels) for image in listed]
    if not batches or len({batch.shape[-2:] for batch in batches}) > 1:
        raise ConditionError(f"The images for {name!r} must be one or more images of the same size.")
    batch = torch.cat(batches)
    if len(batch) > 1 and layout is not None and (layout.images % len(batch) or len(batch) % layout.prompts):
        raise ConditionError(
            f"There are {len(batch)} images for {name!r} and {layout.prompts} prompts; give one, or one per prompt."
        )
    return batch


def _batch(name: str, image: Any, channels: int) -> torch.Tensor:
    if isinstance(image, Image.Image):
        return condition_to_tensor(image, channels)[None] / 255
    if isinstance(image, np.ndarray):
        pixels = torch.tensor(image)
        pixels = pixels.movedim(-1, -3) if pixels.dim() >= 3 else pixels
    elif isinstance(image, torch.Tensor):
        pixels = image
    else:
        found = type(image).__name__
        raise ConditionError(f"An image for {name!r} must be a PIL image, an array or a tensor, but is a {found}.")
    pixels = pixels[None] if pixels.dim() == 3 else pixels
    if pixels.dim() != 4 or pixels.shape[1] != channels:
        shape = tuple(image.shape)
        raise ConditionError(f"An image for {name!r} must have {channels} channels, but its shape is {shape}.")
    if pixels.dtype == torch.uint8:
        return pixels / 255
    if not pixels.is_floating_point() or not (pixels.min() >= 0 and pixels.max() <= 1):
        raise ConditionError(f"An image for {name!r} must be uint8, or floating point with values from 0 to 1.")
    return pixels
