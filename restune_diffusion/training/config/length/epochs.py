"""Conversion between epochs and optimizer steps."""

from __future__ import annotations

import math


def steps_of_epochs(epochs: float, samples: int, images_per_step: int) -> int:
    """Return the number of steps after which a number of epochs is complete, at least 1.

    The order of the data is one endless sequence, so an epoch may end within a step.

    Args:
        epochs: the number of epochs.
        samples: samples in one epoch: the images, each as often as it is repeated.
        images_per_step: images in one optimizer step, over all batches and processes.
    """
    # Rounded first, because 0.1 epochs of 30 images are 3.0000000000000004 images.
    return max(1, math.ceil(round(epochs * samples / images_per_step, 6)))
