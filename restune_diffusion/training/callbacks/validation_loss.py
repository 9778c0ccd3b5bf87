"""Callback that measures the loss of the held-out images during training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..config.validation import ValidationConfig
from ..state import StepReport, TrainState
from ..validation.loss import held_out_loss
from ..validation.measurements import VALIDATION_LOSS, Measurement
from .base import Callback

_MEASUREMENTS = 20


def loss_interval(config: ValidationConfig, steps: int) -> int:
    """Return the number of steps between two measurements of the validation loss, for a run of this many steps."""
    return config.loss_every or config.every or math.ceil(steps / _MEASUREMENTS)


class ValidationLoss(Callback):
    """Measure the loss of the held-out images at the start, every N steps and after the last one, and log it.

    Args:
        log: called with the run and the metrics.
        show: called with a line for the terminal; nothing is printed if None.
        encoder: VAE that encodes the masked images of an inpainting base.
    """

    def __init__(
        self,
        log: Callable[[TrainState, dict[str, float]], None],
        show: Callable[[str], object] | None = None,
        encoder: Any = None,
    ) -> None:
        self._log = log
        self._show = show
        self._encoder = encoder

    def on_start(self, run: TrainState) -> None:
        """Measure before the first step, unless the run is resumed after it."""
        if run.step == 0:
            self._measure(run)

    def reads_state(self, run: TrainState, step: int) -> bool:
        """Return whether a measurement is due."""
        interval = loss_interval(run.config.validation, run.steps)
        return run.held_out is not None and (step % interval == 0 or step == run.steps)

    def on_step(self, run: TrainState, report: StepReport) -> None:
        """Measure if it is due."""
        if self.reads_state(run, report.step):
            self._measure(run)

    def _measure(self, run: TrainState) -> None:
        if run.held_out is None:
            return
        measurement = Measurement(VALIDATION_LOSS, run.step, held_out_loss(run, run.held_out, self._encoder))
        run.measurements.add(measurement)
        # Only the main process has a log, and a line on the terminal.
        self._log(run, {VALIDATION_LOSS: measurement.value})
        if self._show is not None and run.accelerator.is_main_process:
            best = run.measurements.best(VALIDATION_LOSS)
            note = (
                "the best so far" if best == measurement else f"best {best.value:.4f} at {best.step}" if best else ""
            )
            self._show(f"held out    loss {measurement.value:.4f} at step {run.step} ({note or 'not finite'})")
