"""Callback that measures the tuner with the metrics of an evaluation, on images that its saved file generates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from ...evaluation.comparison import Row
from ...evaluation.metric_names import METRICS
from ...pipelines.load_base import sampling_pipeline
from ...storage.tuner_file import save_tuner
from ..callbacks.base import Callback
from ..callbacks.validation import encoders_on, only_tuner
from ..config.validation import logged_name
from ..processes import gather_objects
from ..state import StepReport, TrainState
from .measurements import Measurement
from .metric_inputs import MetricInputs


class CheckpointMetrics(Callback):
    """Measure the metrics at the start, every `validation.every` steps, and at the end.

    Place it before `BestFile`, which goes by the measurements.

    Args:
        inputs: what the metrics compare with; None if nothing is measured.
        log: called with the run and the metrics.
        show: called with a line for the terminal; nothing is printed if None.
    """

    def __init__(
        self,
        inputs: MetricInputs | None,
        log: Callable[[TrainState, dict[str, float]], None],
        show: Callable[[str], object] | None = None,
    ) -> None:
        self._inputs = inputs
        self._log = log
        self._show = show
        self._measured: int | None = None

    def on_start(self, run: TrainState) -> None:
        """Measure before the first step, unless the run is resumed."""
        if run.step == 0:
            self._measure(run)

    def reads_state(self, run: TrainState, step: int) -> bool:
        """Return whether the metrics are due: every `validation.every` steps and after the last one."""
        measures = self._inputs is not None and bool(self._inputs.names)
        return measures and (run.config.validation.due(step) or step == run.steps)

    def on_step(self, run: TrainState, report: StepReport) -> None:
        """Measure if it is due."""
        if self.reads_state(run, report.step):
            self._measure(run)

    def on_end(self, run: TrainState) -> None:
        """Measure the finished tuner of a run that stopped early between two measurements."""
        if run.stopped_early is not None and run.step != self._measured:
            self._measure(run)

    def _measure(self, run: TrainState) -> None:
        inputs, self._measured = self._inputs, run.step
        if inputs is None or not inputs.names:
            return
        own = [self._row(run, inputs)] if run.accelerator.is_main_process else []
        (row,) = gather_objects(run.accelerator, own)
        values = {name: value for name in inputs.names if (value := row[name]) is not None}
        for name, value in values.items():
            lower = METRICS[name].lower_is_better
            run.measurements.add(Measurement(logged_name(name), run.step, value, lower))
        self._log(run, {logged_name(name): value for name, value in values.items()})
        if self._show is not None and run.accelerator.is_main_process:
            shown = ", ".join(f"{logged_name(name)} {value:.4f}" for name, value in values.items())
            self._show(f"metrics     {shown} at step {run.step}")

    def _row(self, run: TrainState, inputs: MetricInputs) -> Row:
        """Return the metrics of the tuner, from a file of its released weights."""
        sampler = sampling_pipeline(run.pipeline, run.objective.scheduler_changes)
        with TemporaryDirectory(dir=run.config.output, prefix=".sample-", suffix=".tmp") as folder:
            file = Path(folder) / "tuner.safetensors"
            with run.released_weights():
                save_tuner(run.tuner, file)
            with only_tuner(sampler, file), encoders_on(run.pipeline, run.accelerator.device):
                return inputs.measure(sampler)
