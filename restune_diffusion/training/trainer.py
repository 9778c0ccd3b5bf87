"""Train a tuner, from a config to a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import is_tensorboard_available
from diffusers.optimization import get_scheduler

from ..attachment import attach
from ..errors import TrainingError
from ..fileformat import save_tuner
from ..sites import text_encoders
from ..tuner import Tuner
from ..words import holds_word
from .averaging import TunerAverage, UpdateAverage
from .base import PRECISIONS, check_trainable, frozen, load_base, move_encoders, sampling_pipeline, training_resolution
from .batches import Batches
from .cache import build_cache
from .cache_shards import build_together
from .captions import Example, find_examples
from .checkpoint import Checkpoints, latest_checkpoint, restore_checkpoint
from .condition_source import ConditionSource
from .conditioning import LiveEncoder
from .config import TrainConfig
from .data import load_samples
from .facts import training_facts
from .inpainting import InpaintingInputs, is_inpainting
from .loop import run_loop
from .memory import drop_encoders, gradient_checkpointing
from .noising import Noising
from .objective import Objective
from .optimizers import make_optimizer
from .parameter_groups import parameter_groups
from .processes import check_distribution
from .quantization import quantize_base
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
    if config.drop_encoders and pipeline is not None:
        raise TrainingError("The encoders of a pipeline that is in use cannot be dropped; leave drop_encoders out.")
    if config.base_quantization is not None and pipeline is not None:
        raise TrainingError("A pipeline that is in use is not quantised; leave base_quantization out.")
    _check_output(config)
    accelerator = _make_accelerator(config)
    examples = find_examples(config.data, config.prompt)
    _check_words(config, examples)
    conditions = ConditionSource(config.control, config.control_data) if "control" in config.kinds else None
    if conditions is not None:
        examples = conditions.paired(examples, config.data)
    if pipeline is None:
        pipeline = load_base(config.base, PRECISIONS[config.mixed_precision])
        if config.base_quantization is not None:
            # Before it goes to the device, which never holds it in full.
            quantize_base(pipeline.unet)
    check_trainable(pipeline)
    if config.drop_encoders and is_inpainting(pipeline):
        raise TrainingError("An inpainting base encodes masked images in each step; leave drop_encoders out.")
    resolution = training_resolution(pipeline, config.resolution)
    steering = conditions.samples(config.validation.control_images, resolution) if conditions is not None else []
    pipeline.to(accelerator.device)
    with frozen(pipeline):
        inpainting = is_inpainting(pipeline)
        cache = build_together(
            accelerator,
            examples,
            lambda share: build_cache(pipeline, load_samples(share, resolution, conditions), inpainting),
        )
        if config.drop_encoders:
            drop_encoders(pipeline)
        kept = (*(text_encoders(pipeline) if "text" in config.kinds else ()), *(["vae"] if inpainting else ()))
        move_encoders(pipeline, torch.device("cpu"), keep=kept)
        try:
            run = _make_run(config, accelerator, pipeline, cache, resolution, conditions)
            losses: list[float] = []
            samples = ValidationSamples(steering)
            hooks: list[Hook] = [Progress(lambda report: losses.append(report.loss)), MetricsLog(), UpdateAverage()]
            hooks += [ProgressBar()] if verbose else []
            # Checkpoints come last: whatever a step's hooks write is there, whole, once the step is saved.
            hooks += [FinalFile(), samples, Checkpoints()]
            hooks += [Progress(on_progress)] if on_progress else []
            if verbose:
                accelerator.print(describe_plan(run))
            accelerator.init_trackers("logs")
            stop = StopRequest()
            with (
                attach(pipeline.unet, run.tuner, ATTACHED_NAME, text=text_encoders(pipeline)),
                gradient_checkpointing(pipeline.unet, config.gradient_checkpointing),
                stop.listening() if stop_on_signal else nullcontext(),
            ):
                run_loop(run, hooks, stop)
        finally:
            move_encoders(pipeline, accelerator.device)
            accelerator.end_training()
    seconds = time.perf_counter() - started
    return TrainResult(config.file, run.step, seconds, tuple(losses), tuple(samples.folders))


class FinalFile(Hook):
    """Writes the finished tuner."""

    def on_end(self, run: TrainingRun) -> None:
        """Write the file."""
        if run.accelerator.is_main_process:
            with run.released_weights():
                save_tuner(run.tuner, run.config.file, training=training_facts(run))
        run.accelerator.wait_for_everyone()


def _check_output(config: TrainConfig) -> None:
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


def _make_accelerator(config: TrainConfig) -> Accelerator:
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
    check_distribution(accelerator)
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise TrainingError("fp16 needs a GPU; train on the CPU in fp32 (mixed precision `no`) or bf16.")
    return accelerator


def _make_run(
    config: TrainConfig,
    accelerator: Accelerator,
    pipeline: Any,
    cache: Any,
    resolution: int,
    conditions: ConditionSource | None,
) -> TrainingRun:
    """Put the parts of a run together, and restore them from the newest checkpoint if asked."""
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
            inpainting=InpaintingInputs(pipeline.vae, cache.pictures) if cache.pictures else None,
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
