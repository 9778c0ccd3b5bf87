"""Resolution of a run's length to a number of steps, once the training data is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..presets import PRESETS
from .epochs import steps_of_epochs
from .rule import EpochsRule

if TYPE_CHECKING:
    from ..train_config import TrainConfig

DEFAULT_STEPS = 2000
"""Number of steps if neither settings nor preset give a length."""


@dataclass(frozen=True)
class Length:
    """Number of steps of a run, and the setting or rule that it was derived from; empty if the number was given."""

    steps: int
    origin: str = ""


def resolve_length(config: TrainConfig, *, images: int, samples: int, images_per_step: int) -> Length:
    """Return the length of a run. `steps` and `epochs` take precedence over the preset.

    Args:
        config: settings of the run.
        images: number of training images.
        samples: samples in one epoch: the images, each as often as it is repeated.
        images_per_step: images in one optimizer step, over all batches and processes.
    """
    if config.epochs is not None:
        return Length(steps_of_epochs(config.epochs, samples, images_per_step), f"--epochs {config.epochs:g}")
    if config.steps is not None:
        return Length(config.steps)
    length = PRESETS[config.preset].length if config.preset is not None else DEFAULT_STEPS
    if isinstance(length, EpochsRule):
        return Length(length.steps(images, images_per_step), f"preset {config.preset}: {length}")
    return Length(length)


def with_length(config: TrainConfig, length: Length) -> TrainConfig:
    """Return a copy of the settings with the resolved number of steps, which repeat and resume the run exactly."""
    return config.model_copy(update={"steps": length.steps, "epochs": None})
