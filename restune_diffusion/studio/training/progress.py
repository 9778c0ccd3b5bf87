"""Progress of a run, read from its output folder alone, so that every browser shows the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import median

from ...run_queue.queue import QueuedRun
from ...training.callbacks.metrics_file import METRICS_FILE, Series, read_metrics
from ...training.config.config_file import read_config
from ...training.config.train_config import TrainConfig
from ...training.output_folder import CONFIG_FILE
from ...training.report.run_folder import find_samples
from ...training.validation.measurements import VALIDATION_LOSS
from ...utils.errors import RestuneError

LOSS_WINDOW = 50
_SPEED_WINDOW = 50


@dataclass(frozen=True)
class RunProgress:
    """Progress of a run.

    Attributes:
        steps: number of steps of the whole run; None until training has begun.
        step: last finished step.
        series: logged metrics by name.
        samples: sample images of each step, by the number of their prompt.
        prompts: prompts of the samples.
        seed: seed of all samples.
    """

    steps: int | None = None
    step: int = 0
    series: Mapping[str, Series] = field(default_factory=dict)
    samples: Mapping[int, Mapping[int, Path]] = field(default_factory=dict)
    prompts: Sequence[str] = ()
    seed: int = 0
    tuner: Path | None = None

    @property
    def loss(self) -> float | None:
        """Mean training loss of the last steps."""
        recent = [value for _, value in self.series.get("loss", ())[-LOSS_WINDOW:]]
        return sum(recent) / len(recent) if recent else None

    @property
    def validation_loss(self) -> float | None:
        """Last loss of the held-out images, if there are any."""
        values = self.series.get(VALIDATION_LOSS, ())
        return values[-1][1] if values else None

    @property
    def seconds_per_step(self) -> float | None:
        """Usual time of a step; samples and checkpoints are not part of it."""
        recent = [value for _, value in self.series.get("seconds", ())[-_SPEED_WINDOW:]]
        return median(recent) if recent else None

    @property
    def images_per_second(self) -> float | None:
        """Usual number of training images in a second."""
        recent = [value for _, value in self.series.get("images_per_second", ())[-_SPEED_WINDOW:]]
        return median(recent) if recent else None

    @property
    def memory_mib(self) -> float | None:
        """Peak memory of the process so far."""
        values = self.series.get("peak_memory_mib", ())
        return values[-1][1] if values else None

    @property
    def seconds_left(self) -> float | None:
        """Time of the steps that are left."""
        each = self.seconds_per_step
        return None if each is None or self.steps is None else each * max(0, self.steps - self.step)


def read_progress(run: QueuedRun) -> RunProgress:
    """Return the progress of a run; that of a run that has not begun, or whose folder is gone, is empty."""
    config = _config(run.output / CONFIG_FILE, _stamp(run.output / CONFIG_FILE))
    if config is None:
        return RunProgress()
    metrics = run.output / METRICS_FILE
    series = _metrics(metrics, _stamp(metrics))
    tuner = run.output / config.file.name
    return RunProgress(
        steps=config.steps,
        step=max((steps[-1][0] for steps in series.values()), default=0),
        series=series,
        samples=find_samples(run.output / "samples"),
        prompts=config.validation.prompts,
        seed=config.validation.seed,
        tuner=tuner if tuner.is_file() else None,
    )


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


# Every open page asks every two seconds; the files change once in a step.
@lru_cache(maxsize=8)
def _metrics(path: Path, stamp: tuple[int, int]) -> dict[str, Series]:
    return read_metrics(path)


@lru_cache(maxsize=32)
def _config(path: Path, stamp: tuple[int, int]) -> TrainConfig | None:
    if stamp == (0, 0):
        return None
    try:
        return read_config(path)
    except RestuneError:
        return None
