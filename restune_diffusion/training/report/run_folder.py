"""Read what a training run has left in its output folder, whether it is finished, broken off or still going on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from ...storage.tuner_file import TunerInfo, read_info
from ...utils.errors import RestuneError
from ..callbacks.config_record import CONFIG_FILE
from ..callbacks.metrics_file import METRICS_FILE, Series, read_metrics
from ..checkpoint import latest_checkpoint
from ..config.config_file import read_config
from ..config.train_config import TrainConfig
from .data_sheet import DataSheet, read_data_sheet

_SAMPLES = re.compile(r"step-(\d+)")
_SAMPLE = re.compile(r"(\d+)\.png")


@dataclass(frozen=True)
class RunFolder:
    """The output folder of a run.

    Attributes:
        path: the folder.
        config: the run's settings.
        series: the logged figures by name, each with its steps.
        logged: when the last step was logged.
        samples: the sample images of each step, by the number of their prompt.
        data: what was trained on, if the run wrote it down.
    """

    path: Path
    config: TrainConfig
    series: dict[str, Series]
    logged: datetime | None
    samples: dict[int, dict[int, Path]]
    data: DataSheet | None

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return max((steps[-1][0] for steps in self.series.values()), default=0)

    @cached_property
    def tuner(self) -> tuple[Path, TunerInfo, int] | None:
        """The finished tuner or the newest checkpoint's, what its file says, and the step of its weights."""
        candidates = [(self.path / self.config.file.name, self.step)] if self.finished else []
        checkpoint = latest_checkpoint(self.path)
        if checkpoint is not None:
            candidates.append((checkpoint / "tuner.safetensors", int(checkpoint.name.partition("-")[2])))
        for path, step in candidates:
            try:
                return path, read_info(path), step
            except RestuneError:
                continue  # being pruned, or damaged: the page shows what is left
        return None

    @property
    def finished(self) -> bool:
        """Whether the last step is done and its tuner written."""
        return self.step >= self.config.steps and (self.path / self.config.file.name).is_file()


def read_run_folder(path: Path) -> RunFolder:
    """Read the output folder of a run.

    Raises:
        RestuneError: if there is none, or its settings cannot be read.
    """
    if not path.is_dir():
        raise RestuneError(f"There is no folder {path}; give the output folder of a training.")
    if not (path / CONFIG_FILE).is_file():
        raise RestuneError(f"{path} has no {CONFIG_FILE}; give the output folder of a training, which writes one.")
    metrics = path / METRICS_FILE
    logged = datetime.fromtimestamp(metrics.stat().st_mtime, UTC) if metrics.is_file() else None
    return RunFolder(
        path=path,
        config=read_config(path / CONFIG_FILE),
        series=read_metrics(metrics),
        logged=logged,
        samples=_find_samples(path / "samples"),
        data=read_data_sheet(path),
    )


def _find_samples(folder: Path) -> dict[int, dict[int, Path]]:
    found: dict[int, dict[int, Path]] = {}
    for step in folder.glob("step-*"):
        name = _SAMPLES.fullmatch(step.name)
        images = {int(match[1]): each for each in step.glob("*.png") if (match := _SAMPLE.fullmatch(each.name))}
        if name is not None and images:
            found[int(name[1])] = images
    return dict(sorted(found.items()))
