"""Train a tuner, from a config to a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import is_tensorboard_available
from diffusers.optimization import get_scheduler
from PIL import Image

from ..attachment import attach
from ..errors import TrainingError
from ..fileformat import save_tuner
from ..sites import text_encoders
from ..tuner import Tuner
from ..words import holds_word
from .averaging import TunerAverage, UpdateAverage
from .bank import bank_stream, hash_of_models, use_bank
from .base import PRECISIONS, check_trainable, frozen, load_base, move_encoders, sampling_pipeline, training_resolution
from .batches import Batches
from .cache import Cache, build_cache
from .captions import Example, find_examples
from .checkpoint import Checkpoints, latest_checkpoint, restore_checkpoint
from .condition_source import ConditionSource
from .conditioning import LiveEncoder
from .config import TrainConfig
from .data import load_samples
from .facts import training_facts
from .loop import run_loop
from .memory import drop_encoders, gradient_checkpointing
from .noising import Noising
from .objective import Objective
from .optimizers import make_optimizer
from .parameter_groups import parameter_groups
from .reporting import MetricsLog, Progress, ProgressBar, describe_plan
from .run import ATTACHED_NAME, Hook, StepReport, TrainingRun
from .stopping import StopRequest
from .validation import ValidationSamples


@dataclass(frozen=True)
class TrainResult:
    """What came out of a training run; the losses are those of the steps that this call did."""

    path: Path
    steps: int
    seconds: float
    losses: tuple[float, ...]
    samples: tuple[Path, ...]


@dataclass(frozen=True)
class Ground:
    """What training runs stand on, and what several of them may share: the base and the encoded data."""

    pipeline: Any
    cache: Cache
    resolution: int
    conditions: ConditionSource | None
    steering: Sequence[Mapping[str, Image.Image]]
    """What steers the validation samples of a control tuner."""
    models: str | None
    """Hash of the models, if a feature bank asks for it."""


@contextmanager
def prepared(config: TrainConfig, accelerator: Accelerator, pipeline: Any = None) -> Iterator[Ground]:
    """Load the base and encode the data, and give the pipeline back at the end as it was.

    Raises:
        DataError: if the images or captions cannot be used.
        TrainingError: if the pipeline cannot be trained on.
    """
    if config.drop_encoders and pipeline is not None:
        raise TrainingError("The encoders of a pipeline that is in use cannot be dropped; leave drop_encoders out.")
    examples = find_examples(config.data, config.prompt)
    _check_words(config, examples)
    conditions = ConditionSource(config.control, config.control_data) if "control" in config.kinds else None
    if conditions is not None:
        examples = conditions.paired(examples, config.data)
    if pipeline is None:
        pipeline = load_base(config.base, PRECISIONS[config.mixed_precision])
    check_trainable(pipeline)
    resolution = training_resolution(pipeline, config.resolution)
    steering = conditions.samples(config.validation.control_images, resolution) if conditions is not None else []
    pipeline.to(accelerator.device)
    with frozen(pipeline):
        cache = build_cache(pipeline, load_samples(examples, resolution, conditions))
        models = hash_of_models(pipeline) if config.feature_bank is not None else None
        if config.drop_encoders:
            drop_encoders(pipeline)
        move_encoders(pipeline, torch.device("cpu"), keep=text_encoders(pipeline) if "text" in config.kinds else ())
        try:
            yield Ground(pipeline, cache, resolution, conditions, steering, models)
        finally:
            move_encoders(pipeline, accelerator.device)


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
        pipeline: a loaded text-to-image pipeline to train on instead of loading `config.base`; it is moved to the
            training device and otherwise left as it was.
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
    accelerator = make_accelerator(config)
    with prepared(config, accelerator, pipeline) as ground:
        try:
            run = make_run(config, accelerator, ground)
            losses: list[float] = []
            samples = ValidationSamples(ground.steering)
            hooks: list[Hook] = [Progress(lambda report: losses.append(report.loss))]
            hooks += run_hooks(samples, [ProgressBar()] if verbose else [])
            hooks += [Progress(on_progress)] if on_progress else []
            if verbose:
                accelerator.print(describe_plan(run))
            accelerator.init_trackers("logs")
            if config.feature_bank is not None:
                use_bank([run], ground.models, verbose)
            stop = StopRequest()
            with acting(run), stop.listening() if stop_on_signal else nullcontext():
                run_loop(run, hooks, stop)
        finally:
            accelerator.end_training()
    seconds = time.perf_counter() - started
    return TrainResult(config.file, run.step, seconds, tuple(losses), tuple(samples.folders))


def run_hooks(samples: ValidationSamples, shown: Sequence[Hook]) -> list[Hook]:
    """Return what watches every run, with what shows its progress in between."""
    # Checkpoints come last: whatever a step's hooks write is there, whole, once the step is saved.
    return [MetricsLog(), UpdateAverage(), *shown, FinalFile(), samples, Checkpoints()]


@contextmanager
def acting(run: TrainingRun) -> Iterator[None]:
    """Attach a run's tuner to the base meanwhile, unless it is trained on features that are known."""
    unet, config = run.pipeline.unet, run.config
    if config.feature_bank is not None:
        yield
        return
    with (
        attach(unet, run.tuner, ATTACHED_NAME, text=text_encoders(run.pipeline)),
        gradient_checkpointing(unet, config.gradient_checkpointing),
    ):
        yield


class FinalFile(Hook):
    """Writes the finished tuner."""

    def on_end(self, run: TrainingRun) -> None:
        """Write the file."""
        if run.accelerator.is_main_process:
            with run.released_weights():
                save_tuner(run.tuner, run.config.file, training=training_facts(run))
        run.accelerator.wait_for_everyone()


def check_output(config: TrainConfig) -> None:
    """Raise `TrainingError` if the output folder is among the images, or holds a run that would be overwritten."""
    if config.output.resolve().is_relative_to(config.data.resolve()):
        raise TrainingError(
            f"{config.output} lies inside the image folder, where the samples would become training images; "
            f"choose another output folder."
        )
    found = latest_checkpoint(config.output)
    if found is not None and not config.resume:
        raise TrainingError(
            f"{config.output} holds {found.name} of an earlier run; add --resume to go on from it, "
            f"or choose another output folder."
        )


def _check_words(config: TrainConfig, examples: Sequence[Example]) -> None:
    words = config.text.tokens if "text" in config.kinds else ()
    missing = [word for word in words if not any(holds_word(example.caption, [word]) for example in examples)]
    if missing:
        raise TrainingError(
            f"No caption has the new word {missing[0]}, which could learn nothing then; write it into the captions, "
            f'for instance --prompt "a picture of {missing[0]}".'
        )


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Make what places the run on its devices; raises `TrainingError` if it cannot run here."""
    if config.log_with == "tensorboard" and not is_tensorboard_available():
        # accelerate would only leave the log out
        raise TrainingError(
            "TensorBoard is not installed; run pip install 'restune-diffusion[tensorboard]', or leave --log-with out."
        )
    # Two runs of one process may differ in precision, which accelerate keeps in a state of the whole process.
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            cpu=config.cpu,
            log_with=config.log_with,
            project_dir=config.output,
        )
    except (ValueError, ImportError) as error:
        raise TrainingError(f"Training cannot start: {str(error).strip().splitlines()[0]}") from error
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise TrainingError("fp16 needs a GPU; train on the CPU in fp32 (mixed precision `no`) or bf16.")
    return accelerator


def make_run(config: TrainConfig, accelerator: Accelerator, ground: Ground) -> TrainingRun:
    """Put the parts of a run together, and restore them from the newest checkpoint if asked."""
    pipeline, cache, resolution, conditions = ground.pipeline, ground.cache, ground.resolution, ground.conditions
    objective = Objective(
        pipeline.scheduler,
        config.snr_gamma,
        debiased_estimation=config.debiased_estimation,
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
    )
    tuner = Tuner.for_pipeline(pipeline, *config.parts, generator=torch.Generator().manual_seed(config.seed))
    tuner.to(accelerator.device)
    optimizer = make_optimizer(
        config.optimizer,
        parameter_groups(config, tuner),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
    )
    run = TrainingRun(
        config=config,
        accelerator=accelerator,
        pipeline=pipeline,
        tuner=tuner,
        # Only the optimizer is prepared: the tuner runs in hooks, and the schedule counts steps, not processes.
        optimizer=accelerator.prepare(optimizer),
        lr_scheduler=_make_lr_scheduler(config, optimizer),
        cache=cache,
        batches=Batches(
            cache,
            seed=config.seed,
            size=config.batch_size,
            timesteps=objective.timesteps,
            caption_dropout=config.caption_dropout,
            device=accelerator.device,
            dtype=pipeline.unet.dtype,
            noising=_noising(config),
            encode=LiveEncoder(sampling_pipeline(pipeline)) if "text" in config.kinds else None,
            stream=bank_stream(config, cache),
        ),
        objective=objective,
        resolution=resolution,
        conditions=conditions,
        average=TunerAverage(tuner, config.ema_decay) if config.ema_decay is not None else None,
    )
    checkpoint = latest_checkpoint(config.output) if config.resume else None
    if checkpoint is not None:
        restore_checkpoint(run, checkpoint)
    return run


def _make_lr_scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer) -> Any:
    return get_scheduler(
        config.lr_scheduler,
        optimizer,
        step_rules=config.lr_step_rules,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )


def _noising(config: TrainConfig) -> Noising:
    return Noising(
        offset=config.noise_offset,
        perturbation=config.input_perturbation,
        sampling=config.timestep_sampling,
        logit_mean=config.logit_mean,
        logit_std=config.logit_std,
        low=config.min_timestep,
        high=config.max_timestep,
    )
