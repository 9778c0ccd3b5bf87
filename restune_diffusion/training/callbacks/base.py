"""Callback: what watches a training run, and the one that every run has."""

from __future__ import annotations

from ..state import StepReport, TrainState


class Callback:
    """Something that watches a training run; every process calls it, in the order of the hooks."""

    def on_start(self, run: TrainState) -> None:
        """Called once, before the first step of this process."""

    def on_step(self, run: TrainState, report: StepReport) -> None:
        """Called after every optimizer step."""

    def on_stop(self, run: TrainState) -> None:
        """Called instead of `on_end` where the run was asked to stop before its last step."""

    def on_end(self, run: TrainState) -> None:
        """Called once, after the last step."""

    def close(self) -> None:
        """Called at last, also after an error."""


class UpdateAverage(Callback):
    """Takes every step's weights into the average; place it before everything that saves or draws."""

    def on_step(self, run: TrainState, report: StepReport) -> None:
        """Take the weights in."""
        if run.average is not None:
            run.average.update()
