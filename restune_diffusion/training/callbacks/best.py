"""Callbacks that act on a run's measurements: keep the best tuner, and stop early."""

from __future__ import annotations

from ...utils.display import counted
from ..output_folder import best_file
from ..state import StepReport, TrainState
from ..validation.measurements import Measurement
from .base import Callback
from .tuner_files import write_file


class BestFile(Callback):
    """Write the tuner with the best measurement so far to NAME.best.safetensors, if `keep` is `best`.

    Place it after all callbacks that measure, and before `Checkpoints`, which save a copy of the file.
    """

    def __init__(self) -> None:
        self._written: Measurement | None = None

    def on_start(self, run: TrainState) -> None:
        """Write the first file, unless the run is resumed."""
        self._keep(run, run.step)

    def on_step(self, run: TrainState, report: StepReport) -> None:
        """Write the file if the step has the best measurement."""
        self._keep(run, report.step)

    def on_end(self, run: TrainState) -> None:
        """Write the file if the finished tuner has the best measurement."""
        self._keep(run, run.step)

    def _keep(self, run: TrainState, step: int) -> None:
        checkpoints = run.config.checkpoints
        best = run.measurements.best(checkpoints.best_by)
        if checkpoints.keep == "best" and best is not None and best.step == step and best != self._written:
            facts = {"best": {"measurement": best.name, "step": best.step, "value": best.value}}
            write_file(run, best_file(run.config), facts)
            self._written = best


class EarlyStop(Callback):
    """End the run after `patience` measurements in a row without a new best one.

    Place it after all callbacks that measure. What follows is the end of a finished run, with its files and samples.
    """

    def on_start(self, run: TrainState) -> None:
        """End a resumed run that has stopped early before, unless its patience is larger now."""
        self._decide(run, run.step)

    def on_step(self, run: TrainState, report: StepReport) -> None:
        """End the run if its patience is over."""
        self._decide(run, report.step)

    def _decide(self, run: TrainState, step: int) -> None:
        patience, name = run.config.checkpoints.patience, run.config.checkpoints.best_by
        if patience is None or step >= run.steps or run.stopped_early is not None:
            return
        best, since = run.measurements.best(name), run.measurements.since_best(name)
        if best is not None and since >= patience:
            later = f"{counted(since, 'measurement')} since then {'was' if since == 1 else 'were'} not better"
            run.stopped_early = f"{name} was best at step {best.step} ({best.value:.4g}), and {later}"
