"""Base class of training callbacks, and the callback that updates averaged weights."""

from __future__ import annotations

from ..state import StepReport, TrainState


class Callback:
    """Callback of a training run; every process calls the callbacks in the order of their list.

    On CUDA `on_step` may come when the next step has been launched, so `run.step` may be one above `report.step`. A
    callback that uses the state after a step says so by `reads_state`, and then both are equal.
    """

    def on_start(self, run: TrainState) -> None:
        """Called once, before the first step of this process."""

    def on_update(self, run: TrainState) -> None:
        """Called right after every update of the tuner, whose loss may not be known yet."""

    def reads_state(self, run: TrainState, step: int) -> bool:
        """Return whether `on_step` uses the state of the run after a step; that step is then reported at once.

        The answer must be the same in all processes.
        """
        return False

    def on_step(self, run: TrainState, report: StepReport) -> None:
        """Called with the report of every optimizer step, in their order."""

    def on_stop(self, run: TrainState) -> None:
        """Called instead of `on_end` if the run is stopped before its last step."""

    def on_end(self, run: TrainState) -> None:
        """Called once, after the last step."""

    def close(self) -> None:
        """Called at the end of the run, also after an error."""


class UpdateAverage(Callback):
    """Update the averaged weights after every update of the tuner."""

    def on_update(self, run: TrainState) -> None:
        """Update the average."""
        if run.average is not None:
            run.average.update()
