"""Callback that generates validation samples when another program asks for them by a file in the run's folder."""

from __future__ import annotations

from pathlib import Path

from ...utils.errors import TrainingError
from ..state import StepReport, TrainState
from .base import Callback
from .validation import ValidationSamples

REQUEST_FILE = "sample-now"
"""Name of the file in the output folder of a run that asks for samples after the current step."""


def request_samples(output: Path) -> None:
    """Ask the run that writes to a folder for samples of its validation prompts after the current step.

    Raises:
        TrainingError: if the file of the request cannot be written.
    """
    try:
        (output / REQUEST_FILE).touch()
    except OSError as error:
        raise TrainingError(
            f"Samples cannot be requested, because {output} cannot be written to ({error.strerror}); wait until the "
            "run has started, or change the permissions of the folder."
        ) from error


class RequestedSamples(Callback):
    """Generate samples of the validation prompts after a step, if the file `sample-now` is in the output folder.

    The file is removed before the samples are generated. In a run of several processes it is not looked at, because
    the processes must agree on each step.

    Args:
        samples: callback that generates the samples.
    """

    def __init__(self, samples: ValidationSamples) -> None:
        self._samples = samples

    def reads_state(self, run: TrainState, step: int) -> bool:
        """Return whether samples are requested."""
        return step < run.steps and run.accelerator.num_processes == 1 and (run.config.output / REQUEST_FILE).exists()

    def on_step(self, run: TrainState, report: StepReport) -> None:
        """Generate the samples, unless the next step has been launched already; they then come after that one."""
        if report.step == run.step and self.reads_state(run, report.step):
            self._remove(run)
            self._samples.sample(run)

    def on_end(self, run: TrainState) -> None:
        """Remove a request that came after the last step; the samples of the end answer it."""
        if run.accelerator.is_main_process:
            self._remove(run)

    def _remove(self, run: TrainState) -> None:
        (run.config.output / REQUEST_FILE).unlink(missing_ok=True)
