"""Train a tuner from a config, and write its file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..backbones import text_encoders
from ..hooks.attachment import attach
from ..utils.errors import TrainingError
from .advice import log_warnings
from .build import build_accelerator, build_training_state
from .callbacks.base import Callback, UpdateAverage
from .callbacks.best import BestFile, EarlyStop
from .callbacks.config_record import ConfigFile
from .callbacks.drift import DriftProbe
from .callbacks.reporting import MetricsLog, Progress, ProgressBar, SheetFile, describe_plan
from .callbacks.sample_request import RequestedSamples
from .callbacks.tracking import start_trackers
from .callbacks.tuner_files import FinalFile, StepFiles
from .callbacks.validation import ValidationSamples
from .callbacks.validation_loss import ValidationLoss
from .checkpoint import Checkpoints
from .config.train_config import TrainConfig
from .distillation.teacher import check_teacher
from .feature_cache.use import use_feature_cache
from .initial_tuner import check_initial_tuner
from .inputs import TrainingInputs, prepared
from .loop import run_loop
from .memory import gradient_checkpointing
from .output_folder import best_file, check_output
from .state import ATTACHED_NAME, StepReport, TrainState
from .stopping import StopRequest
from .validation.checkpoint_metrics import CheckpointMetrics


@dataclass(frozen=True)
class TrainResult:
    """Result of a training run; the losses are those of the steps of this call."""

    path: Path
    steps: int
    seconds: float
    losses: tuple[float, ...]
    samples: tuple[Path, ...]
    stopped_early: str | None = None
    """Reason why the run ended before its last step, if it did."""
    best: Path | None = None
    """Path of the tuner with the best measurement, if it is kept."""


def train(
    config: TrainConfig,
    *,
    pipeline: Any = None,
    on_progress: Callable[[StepReport], None] | None = None,
    verbose: bool = True,
    stop_on_signal: bool = False,
) -> TrainResult:
    """Train a tuner and write it to `config.file`.

    Args:
        config: settings of the run.
        pipeline: a loaded text-to-image or inpainting pipeline to train on instead of loading `config.base`; it is
            moved to the training device and otherwise unchanged afterwards.
        on_progress: called after every step.
        verbose: whether to print the plan and a progress bar.
        stop_on_signal: whether SIGTERM and the first Ctrl-C end training after the current step, with a checkpoint.

    Returns:
        Path of the tuner's file, number of steps, time in seconds, losses and sample folders.

    Raises:
        DataError: if the images or captions cannot be used.
        TrainingError: if the run cannot start, diverges, or does not fit the checkpoint to resume from.
        TrainingInterrupted: if a signal stopped the run.
        TunerFileError: if a file cannot be written.
    """
    started = time.perf_counter()
    if config.sweep is not None:
        raise TrainingError("The config has a sweep, which trains several tuners; call `sweep` instead of `train`.")
    check_output(config)
    check_initial_tuner(config)
    check_teacher(config.teacher)
    accelerator = build_accelerator(config)
    with prepared(config, accelerator, pipeline, verbose=verbose) as inputs:
        try:
            run = build_training_state(config, accelerator, inputs)
            losses: list[float] = []
            samples = ValidationSamples(inputs.control_images)
            callbacks: list[Callback] = [Progress(lambda report: losses.append(report.loss))]
            callbacks += run_callbacks(inputs, samples, [ProgressBar()] if verbose else [], verbose=verbose)
            callbacks += [Progress(on_progress)] if on_progress else []
            if verbose:
                accelerator.print(describe_plan(run))
            else:
                inputs.data.warn()
                log_warnings(run)
            start_trackers(accelerator, run.config)
            if config.feature_cache.draws is not None:
                use_feature_cache([run], inputs.models, verbose)
            stop = StopRequest()
            with acting(run), stop.listening() if stop_on_signal else nullcontext():
                run_loop(run, callbacks, stop)
        finally:
            accelerator.end_training()
    seconds = time.perf_counter() - started
    best = best_file(config) if config.checkpoints.keep == "best" else None
    return TrainResult(config.file, run.step, seconds, tuple(losses), tuple(samples.folders), run.stopped_early, best)


def run_callbacks(
    inputs: TrainingInputs, samples: ValidationSamples, shown: Sequence[Callback], *, verbose: bool = False
) -> list[Callback]:
    """Return the callbacks of a run in their order.

    Args:
        inputs: inputs of the run.
        samples: callback that generates the validation samples.
        shown: callbacks that show the progress.
        verbose: whether to print the drift, the validation loss and the metrics.
    """
    log = MetricsLog()
    show = tqdm.write if verbose else None
    drift = DriftProbe(inputs.drift_prompts, log.note, show)
    loss = ValidationLoss(log.note, show, inputs.encoder)
    metrics = CheckpointMetrics(inputs.metrics, log.note, show)
    # What measures comes before what acts on measurements. Checkpoints come last, so that a saved step implies that
    # all files of its other callbacks are complete.
    files = [
        loss,
        metrics,
        BestFile(),
        EarlyStop(),
        drift,
        FinalFile(),
        StepFiles(),
        samples,
        RequestedSamples(samples),
    ]
    return [log, UpdateAverage(), ConfigFile(), SheetFile(), *shown, *files, Checkpoints()]


@contextmanager
def acting(run: TrainState) -> Iterator[None]:
    """Context manager that attaches a run's tuner to the base, unless the tuner is trained on cached features."""
    unet, config = run.pipeline.unet, run.config
    if config.feature_cache.draws is not None:
        yield
        return
    with (
        attach(unet, run.tuner, ATTACHED_NAME, text=text_encoders(run.pipeline)),
        gradient_checkpointing(unet, config.memory.gradient_checkpointing),
    ):
        yield
