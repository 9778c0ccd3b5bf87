"""The state of a training run, and the hooks that watch it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from ..data.condition_source import ConditionSource
from ..tuners.tuner import Tuner
from .config.train_config import TrainConfig
from .latents.batches import BatchSource
from .latents.cache import Cache
from .losses.bands import BandLosses
from .losses.objective import Objective

if TYPE_CHECKING:
    from ..data.data_sheet import DataSheet
    from .callbacks.averaging import TunerAverage
    from .losses.preservation import Preservation

ATTACHED_NAME = "in training"
"""Name of the tuner on the base while it is trained."""


@dataclass
class TrainingRun:
    """Everything that one training run works on; `step` counts the finished optimizer steps."""

    config: TrainConfig
    accelerator: Accelerator
    pipeline: Any
    tuner: Tuner
    optimizer: Any
    lr_scheduler: Any
    cache: Cache
    batches: BatchSource
    objective: Objective
    resolution: int
    conditions: ConditionSource | None = None
    """Where the images come from that steer a control tuner."""
    data: DataSheet | None = None
    """What is trained on and what is left out."""
    average: TunerAverage | None = None
    """The average of the tuner's weights, if one is kept."""
    preservation: Preservation | None = None
    """What keeps the class as the base draws it, if anything."""
    step: int = 0

    def __post_init__(self) -> None:
        self.bands = BandLosses(self.objective.timesteps)

    def released_weights(self) -> AbstractContextManager[None]:
        """Return a context in which the tuner has the weights that are written and drawn with: the average, if any."""
        return nullcontext() if self.average is None else self.average.applied()

    @property
    def images_per_step(self) -> int:
        """Images that one optimizer step sees, over all processes."""
        config = self.config
        return config.batch_size * config.gradient_accumulation_steps * int(self.accelerator.num_processes)


@dataclass(frozen=True)
class StepReport:
    """What happened in one optimizer step."""

    step: int
    steps: int
    loss: float
    grad_norm: float
    learning_rate: float
    seconds: float
    images: int
    preservation_loss: float | None = None
    """What `prior_loss_weight` multiplies, already part of the loss; None where nothing is preserved."""
    band_losses: Mapping[str, float] = field(default_factory=dict)
    """Mean loss of the samples in each band of timesteps, by its first and last one; bands without samples are left
    out."""


class Hook:
    """Something that watches a training run; every process calls it, in the order of the hooks."""

    def on_start(self, run: TrainingRun) -> None:
        """Called once, before the first step of this process."""

    def on_step(self, run: TrainingRun, report: StepReport) -> None:
        """Called after every optimizer step."""

    def on_stop(self, run: TrainingRun) -> None:
        """Called instead of `on_end` where the run was asked to stop before its last step."""

    def on_end(self, run: TrainingRun) -> None:
        """Called once, after the last step."""

    def close(self) -> None:
        """Called at last, also after an error."""
