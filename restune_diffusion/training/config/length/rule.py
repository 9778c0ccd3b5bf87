"""Rule of a preset that derives the number of steps from the number of training images."""

from __future__ import annotations

from dataclasses import dataclass

from .epochs import steps_of_epochs


@dataclass(frozen=True)
class EpochsRule:
    """Number of steps that shows each image a number of times, within bounds.

    An image counts once, however often an epoch repeats it, because repeats of an image add nothing to learn from it.

    Attributes:
        epochs: how many times each image is shown.
        at_least: lower bound of the number of steps.
        at_most: upper bound of the number of steps.
    """

    epochs: float
    at_least: int
    at_most: int

    def __post_init__(self) -> None:
        if not (self.epochs > 0 and 0 < self.at_least <= self.at_most):
            raise ValueError(f"{self} needs a positive number of epochs, and bounds in ascending order")

    def steps(self, images: int, images_per_step: int) -> int:
        """Return the number of steps for a number of images."""
        return min(max(steps_of_epochs(self.epochs, images, images_per_step), self.at_least), self.at_most)

    def __str__(self) -> str:
        """Describe the rule."""
        return f"{self.epochs:g} epochs, at least {self.at_least} and at most {self.at_most} steps"
