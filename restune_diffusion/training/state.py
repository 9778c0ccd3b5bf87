"""State of a training run, and the report of one step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..data.condition_source import ConditionSource
from ..data.data_sheet import DataSheet
from ..tuners.tuner import Tuner
from .config.length.resolve import Length
from .config.train_config import TrainConfig
from .distillation.teacher import Teacher
from .latents.batches import Batch, BatchSource
from .latents.cache import Cache
from .losses.bands import BandLosses
from .losses.objective import Objective
from .optimization.averaging import TunerAverage
from .validation.held_out import HeldOut
from .validation.measurements import Measurements
from .validation.metric_inputs import MetricInputs

ATTACHED_NAME = "in training"
"""Name under which the tuner is attached to the base during training."""


class Preservation(ABC):
    """Base class of preservation losses, which are added to the loss of each batch of images."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """Hash or text that identifies the preservation data beyond the settings."""

    @abstractmethod
    def describe(self) -> str:
        """Return a short description of what is preserved."""

    @abstractmethod
    def loss(self, run: TrainState, batch: Batch, number: int) -> torch.Tensor:
        """Return the preservation loss for a batch of images, an unweighted scalar.

        Args:
            run: state of the run.
            batch: the batch of images.
            number: number of the batch.
        """


class ImageLoss(ABC):
    """Base class of losses that replace the plain loss of a batch of images."""

    @abstractmethod
    def describe(self) -> str:
        """Return a line for the plan of the run: a title of up to 11 letters, and a short description."""

    @abstractmethod
    def loss(self, run: TrainState, batch: Batch, number: int) -> torch.Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            run: state of the run.
            batch: the batch.
            number: number of the batch.
        """


@dataclass(frozen=True)
class InitialTuner:
    """Name and SHA-256 of the tuner file that a run started from."""

    file: str
    sha256: str


@dataclass
class TrainState:
    """State of one training run; `step` counts the finished optimizer steps.

    `config` has the resolved number of steps, which `length` explains.
    """

    config: TrainConfig
    length: Length
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
    """Source of the condition images of a control tuner."""
    data: DataSheet | None = None
    """Report of the images used and the images skipped."""
    average: TunerAverage | None = None
    """Moving average of the tuner's weights, if enabled."""
    preservation: Preservation | None = None
    """Preservation loss, if enabled."""
    image_loss: ImageLoss | None = None
    """Loss of the images in place of the plain one, if set."""
    initial: InitialTuner | None = None
    """Tuner file that the run started from, if any."""
    vae: str | None = None
    """Hash of the VAE that replaces that of the base, if one does."""
    teacher: Teacher | None = None
    """Teacher of a distillation, if there is one."""
    step: int = 0
    resumed_from: Path | None = None
    """Checkpoint that the run continues from, if any."""
    held_out: HeldOut | None = None
    """Images that are held out of training, if any."""
    metrics: MetricInputs | None = None
    """What the metrics of the tuner compare with, if they are measured."""
    measurements: Measurements = field(default_factory=Measurements)
    """Measurements of the tuner so far."""
    stopped_early: str | None = None
    """Reason why the run ends before its last step, if it does."""

    def __post_init__(self) -> None:
        self.bands = BandLosses(self.objective.timesteps)

    def base_precision(self) -> AbstractContextManager[Any]:
        """Return the context manager for forward passes of the base: autocast, unless it is for the tuner alone."""
        return nullcontext() if self.tuner.autocast is not None else self.accelerator.autocast()

    def released_weights(self) -> AbstractContextManager[None]:
        """Return a context manager that gives the tuner its released weights: the moving average, if enabled."""
        return nullcontext() if self.average is None else self.average.applied()

    @property
    def images_per_step(self) -> int:
        """Images per optimizer step, over all processes."""
        return images_per_step(self.config, self.accelerator)

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the whole run."""
        return self.length.steps


def images_per_step(config: TrainConfig, accelerator: Accelerator) -> int:
    """Return the number of images per optimizer step, over all processes."""
    return config.batch_size * config.gradient_accumulation_steps * int(accelerator.num_processes)


@dataclass(frozen=True)
class StepReport:
    """Report of one optimizer step: loss, gradient norm, learning rate and time."""

    step: int
    steps: int
    loss: float
    grad_norm: float
    learning_rate: float
    seconds: float
    images: int
    preservation_loss: float | None = None
    """Preservation loss before `prior_loss_weight`; `loss` includes the weighted one. None without preservation."""
    band_losses: Mapping[str, float] = field(default_factory=dict)
    """Mean loss of the samples in each timestep band, by its first and last timestep; bands without samples are left
    out."""
