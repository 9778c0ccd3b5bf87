"""Train a tuner, from a config to a file."""

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
from ..storage.tuner_file import save_tuner
from ..utils.errors import TrainingError
from .build import build_accelerator, build_training_state
from .callbacks.base import Callback, UpdateAverage
from .callbacks.config_record import ConfigFile
from .callbacks.drift import DriftProbe
from .callbacks.reporting import MetricsLog, Progress, ProgressBar, SheetFile, describe_plan
from .callbacks.tracking import start_trackers
from .callbacks.validation import ValidationSamples
from .checkpoint import Checkpoints, latest_checkpoint
from .config.train_config import TrainConfig
from .facts import training_facts, trigger_words
from .feature_cache.use import use_feature_cache
from .inputs import TrainingInputs, prepared
from .loop import run_loop
from .memory import gradient_checkpointing
from .state import ATTACHED_NAME, StepReport, TrainState
from .stopping import StopRequest


@dataclass(frozen=True)
class TrainResult:
    """What came out of a training run; the losses are those of the steps that this call did."""

    path: Path
    steps: int
    seconds: float
    losses: tuple[float, ...]
    samples: tuple[Path, ...]


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
        config: all settings.
        pipeline: a loaded text-to-image or inpainting pipeline to train on instead of loading `config.base`; it is
            moved to the training device and otherwise left as it was.
        on_progress: called after every step.
        verbose: whether to print the plan and a progress bar.
        stop_on_signal: whether SIGTERM and the first Ctrl-C end the training after the step, with a checkpoint.

    Returns:
        The file's path and the course of the training.

    Raises:
        DataError: if the images or captions cannot be used.
        TrainingError: if the run cannot start, diverges, or does not fit the checkpoint to resume from.
        TrainingInterrupted: if it was stopped by a signal.
        TunerFileError: if a file cannot be written.
    """
    started = time.perf_counter()
    if config.sweep is not None:
        raise TrainingError("This config is of a sweep, which trains several tuners; call `sweep` instead of `train`.")
    check_output(config)
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
            start_trackers(accelerator, config)
            if config.feature_cache.draws is not None:
                use_feature_cache([run], inputs.models, verbose)
            stop = StopRequest()
            with acting(run), stop.listening() if stop_on_signal else nullcontext():
                run_loop(run, callbacks, stop)
        finally:
            accelerator.end_training()
    seconds = time.perf_counter() - started
    return TrainResult(config.file, run.step, seconds, tuple(losses), tuple(samples.folders))


def run_callbacks(
    inputs: TrainingInputs, samples: ValidationSamples, shown: Sequence[Callback], *, verbose: bool = False
) -> list[Callback]:
    """Return what watches every run, with what shows its progress in between."""
    log = MetricsLog()
    leak = DriftProbe(inputs.drift_prompts, log.note, tqdm.write if verbose else None)
    # Checkpoints come last: whatever a step's hooks write is there, whole, once the step is saved.
    return [log, UpdateAverage(), ConfigFile(), SheetFile(), *shown, leak, FinalFile(), samples, Checkpoints()]


@contextmanager
def acting(run: TrainState) -> Iterator[None]:
    """Attach a run's tuner to the base meanwhile, unless it is trained on features that are known."""
    unet, config = run.pipeline.unet, run.config
    if config.feature_cache.draws is not None:
        yield
        return
    with (
        attach(unet, run.tuner, ATTACHED_NAME, text=text_encoders(run.pipeline)),
        gradient_checkpointing(unet, config.memory.gradient_checkpointing),
    ):
        yield


class FinalFile(Callback):
    """Writes the finished tuner."""

    def on_end(self, run: TrainState) -> None:
        """Write the file."""
        if run.accelerator.is_main_process:
            with run.released_weights():
                words = trigger_words(run.config)
                metadata = {"modelspec.trigger_phrase": ", ".join(words)} if words else {}
                save_tuner(run.tuner, run.config.file, training=training_facts(run), metadata=metadata)
        run.accelerator.wait_for_everyone()


def check_output(config: TrainConfig) -> None:
    """Raise `TrainingError` if the output folder is among the images, or holds a run that would be overwritten."""
    if config.output.resolve().is_relative_to(config.data.folder.resolve()):
        raise TrainingError(
            f"{config.output} lies inside the image folder, where the samples would become training images; "
            f"choose another output folder."
        )
    found = latest_checkpoint(config.output)
    if found is not None and not config.checkpoints.resume:
        raise TrainingError(
            f"{config.output} holds {found.name} of an earlier run; add --resume to go on from it, "
            f"or choose another output folder."
        )
