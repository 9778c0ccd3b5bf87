"""Contents of a training run's output folder; the run may be finished, interrupted or in progress."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from ...storage.tuner_file import TunerInfo, read_info
from ...utils.errors import RestuneError
from ..callbacks.metrics_file import METRICS_FILE, Series, read_metrics
from ..config.config_file import read_config
from ..config.train_config import TrainConfig
from ..output_folder import CONFIG_FILE, best_file, latest_checkpoint
from .data_sheet import DataSheet, read_data_sheet

_SAMPLES = re.compile(r"step-(\d+)")
_SAMPLE = re.compile(r"(\d+)\.png")


@dataclass(frozen=True)
class RunFolder:
    """The output folder of a run.

    Attributes:
        path: path of the folder.
        config: settings of the run.
        series: logged metrics by name, each with its steps.
        logged: time of the last log entry.
        samples: sample images of each step, by the number of their prompt.
        data: data sheet of the run, if it wrote one.
    """

    path: Path
    config: TrainConfig
    series: dict[str, Series]
    logged: datetime | None
    samples: dict[int, dict[int, Path]]
    data: DataSheet | None

    @property
    def step(self) -> int:
        """Last logged step."""
        return max((steps[-1][0] for steps in self.series.values()), default=0)

    @property
    def steps(self) -> int:
        """Number of steps of the whole run; every run writes it to its settings."""
        return self.step if self.config.steps is None else self.config.steps

    @cached_property
    def tuner(self) -> tuple[Path, TunerInfo, int] | None:
        """Path, file info and step of the finished tuner, or of the newest checkpoint's."""
        candidates = [(self.path / self.config.file.name, self.step)] if self.finished else []
        checkpoint = latest_checkpoint(self.path)
        if checkpoint is not None:
            candidates.append((checkpoint / "tuner.safetensors", int(checkpoint.name.partition("-")[2])))
        for path, step in candidates:
            try:
                return path, read_info(path), step
            except RestuneError:
                continue  # being deleted, or damaged: use the next candidate
        return None

    @property
    def finished(self) -> bool:
        """Whether the last step has finished, or the run has stopped early, and the tuner file exists."""
        file = self.path / self.config.file.name
        return file.is_file() and (self.step >= self.steps or self.stopped_early is not None)

    @cached_property
    def stopped_early(self) -> str | None:
        """Reason why the run ended before its last step, if it did, from the finished tuner's file."""
        facts = self._facts(self.path / self.config.file.name)
        # A run that was resumed with more patience is beyond the step of the file.
        reason = facts.get("stopped_early") if facts.get("steps") == self.step else None
        return reason if isinstance(reason, str) else None

    @cached_property
    def best(self) -> tuple[Path, str, int, float] | None:
        """Path of the tuner with the best measurement, if it was kept, with the measurement's name, step and value."""
        path = best_file(self.config.model_copy(update={"output": self.path}))
        best: Any = self._facts(path).get("best")
        try:
            return path, str(best["measurement"]), int(best["step"]), float(best["value"])
        except (TypeError, KeyError, ValueError):
            return None

    @staticmethod
    def _facts(path: Path) -> Mapping[str, Any]:
        try:
            return read_info(path).training or {}
        except RestuneError:
            return {}


def read_run_folder(path: Path) -> RunFolder:
    """Read the output folder of a run.

    Raises:
        RestuneError: if the folder does not exist, or its settings cannot be read.
    """
    if not path.is_dir():
        raise RestuneError(f"There is no folder {path}; give the output folder of a training run.")
    if not (path / CONFIG_FILE).is_file():
        raise RestuneError(f"{path} has no {CONFIG_FILE}; give the output folder of a training run or a sweep.")
    metrics = path / METRICS_FILE
    logged = datetime.fromtimestamp(metrics.stat().st_mtime, UTC) if metrics.is_file() else None
    return RunFolder(
        path=path,
        config=read_config(path / CONFIG_FILE),
        series=read_metrics(metrics),
        logged=logged,
        samples=find_samples(path / "samples"),
        data=read_data_sheet(path),
    )


def find_samples(folder: Path) -> dict[int, dict[int, Path]]:
    """Return the sample images of each step of a run, by the number of their prompt."""
    found: dict[int, dict[int, Path]] = {}
    for step in folder.glob("step-*"):
        name = _SAMPLES.fullmatch(step.name)
        images = {int(match[1]): each for each in step.glob("*.png") if (match := _SAMPLE.fullmatch(each.name))}
        if name is not None and images:
            found[int(name[1])] = images
    return dict(sorted(found.items()))
