"""Base class of training callbacks, and the callback that updates averaged weights."""

from __future__ import annotations

from ..state import StepReport, TrainState


class Callback:
    """Callback of a training run; every process calls the callbacks in the order of their list."""

    def on_start(self, run: TrainState) -> None:
        """Called once, before the first step of this process."""

    def on_step(self, run: TrainState, report: StepReport) -> None:
        """Called after every optimizer step."""

    def on_stop(self, run: TrainState) -> None:
        """Called instead of `on_end` if the run is stopped before its last step."""

    def on_end(self, run: TrainState) -> None:
        """Called once, after the last step."""

    def close(self) -> None:
        """Called at the end of the run, also after an error."""


class UpdateAverage(Callback):
    """Update the averaged weights after every step; place it before callbacks that save or generate samples."""

    def on_step(self, run: TrainState, report: StepReport) -> None:
        """Update the average."""
        if run.average is not None:
            run.average.update()
