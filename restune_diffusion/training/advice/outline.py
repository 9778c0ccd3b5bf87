"""Facts of a run that the warnings are derived from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...data.data_sheet import Entry
from ..config.train_config import TrainConfig
from ..state import TrainState


@dataclass(frozen=True)
class RunOutline:
    """Settings, length and data of a run.

    Attributes:
        config: settings of the run.
        steps: optimizer steps of the whole run.
        images: number of training images.
        samples: samples in one epoch: the images, each as often as it is repeated.
        images_per_step: images in one optimizer step, over all batches and processes.
        entries: the training images; empty if they are not recorded.
        held_out: number of held-out images.
    """

    config: TrainConfig
    steps: int
    images: int
    samples: int
    images_per_step: int
    entries: Sequence[Entry] = ()
    held_out: int = 0

    @classmethod
    def of(cls, run: TrainState) -> RunOutline:
        """Return the outline of a run."""
        entries = run.data.entries if run.data is not None else ()
        held_out = len(run.held_out.cache) if run.held_out is not None else 0
        samples = sum(run.cache.repeats)
        return cls(run.config, run.steps, len(run.cache), samples, run.images_per_step, entries, held_out)
