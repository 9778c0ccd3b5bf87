"""The state of a training run, and the hooks that watch it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator

from ..data.condition_source import ConditionSource
from ..data.data_sheet import DataSheet
from ..tuners.tuner import Tuner
from .config.train_config import TrainConfig
from .latents.batches import Batch, BatchSource
from .latents.cache import Cache
from .losses.bands import BandLosses
from .losses.objective import Objective
from .optimization.averaging import TunerAverage

ATTACHED_NAME = "in training"
"""Name of the tuner on the base while it is trained."""


class Preservation(ABC):
    """Adds to each batch of images a loss that keeps the class."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """What the preservation depends on beyond the settings."""

    @abstractmethod
    def describe(self) -> str:
        """Say in a few words what is kept."""

    @abstractmethod
    def loss(self, run: TrainState, batch: Batch, number: int) -> torch.Tensor:
        """Return the loss that goes with a batch of images, a scalar before its weight.

        Args:
            run: the run.
            batch: the batch of images.
            number: its number.
        """


@dataclass
class TrainState:
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
