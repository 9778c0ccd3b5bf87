"""Build the accelerator and the training state of a run from its settings."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler

from ..pipelines.load_base import PRECISIONS, sampling_pipeline
from ..tuners.tuner import Tuner
from ..utils.errors import TrainingError
from ..utils.seeds import derived_seed
from .callbacks.tracking import tracker_name
from .checkpoint import restore_checkpoint
from .config.length.resolve import resolve_length, with_length
from .config.loss import DEFAULT_SIGMA, LossConfig
from .config.noise import NoiseConfig
from .config.optimizer import OptimizerConfig
from .config.train_config import TrainConfig
from .distillation.loss import check_effect
from .feature_cache.use import cached_feature_sampler
from .initial_tuner import load_initial_tuner
from .inputs import TrainingInputs
from .latents.batches import Batches
from .latents.cache import Cache
from .latents.inpainting import InpaintingInputs
from .latents.noising import Noising
from .latents.sampler import SeededSampler
from .latents.text_conditioning import Conditioning, LiveEncoder
from .losses.consistency import Consistency
from .losses.objective import Objective
from .losses.preservation import make_preservation
from .optimization.averaging import TunerAverage
from .optimization.optimizers import make_optimizer
from .optimization.parameter_groups import parameter_groups
from .output_folder import latest_checkpoint
from .processes import check_distribution
from .state import TrainState, images_per_step


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Build the accelerator of a run.

    Raises:
        TrainingError: if the device, the precision or the distributed setup is not supported.
    """
    tracker = tracker_name(config.log_with)
    # Two runs in one process may differ in precision and device, which accelerate keeps in process-wide state. The
    # state of a group of processes stays, because it can be created only once.
    known = PartialState._shared_state
    alone = known.get("distributed_type") == DistributedType.NO
    AcceleratorState._reset_state(reset_partial_state=alone and known.get("_cpu") != config.memory.cpu)
    try:
        accelerator = Accelerator(
            mixed_precision=config.memory.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            cpu=config.memory.cpu,
            log_with=tracker,
            project_dir=config.output,
        )
    except (ValueError, ImportError) as error:
        raise TrainingError(f"Training cannot start: {str(error).strip().splitlines()[0]}") from error
    check_distribution(accelerator)
    if config.memory.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise TrainingError("fp16 needs a GPU; train on the CPU in fp32 (mixed precision `no`) or bf16.")
    return accelerator


def build_training_state(config: TrainConfig, accelerator: Accelerator, inputs: TrainingInputs) -> TrainState:
    """Build the training state, and restore it from the newest checkpoint if `resume` is set."""
    pipeline, cache = inputs.pipeline, inputs.cache
    length = resolve_length(
        config,
        images=len(cache),
        samples=sum(cache.repeats),
        images_per_step=images_per_step(config, accelerator),
    )
    config = with_length(config, length)
    objective = _objective(config.loss, pipeline.scheduler)
    tuner = Tuner.for_pipeline(pipeline, *config.parts, generator=torch.Generator().manual_seed(config.seed))
    initial = load_initial_tuner(config, tuner)
    tuner.to(accelerator.device)
    tuner.autocast = tuner_autocast(config.memory.mixed_precision, pipeline.unet)
    optimizer = make_optimizer(
        config.optimizer.name,
        parameter_groups(config.optimizer, tuner),
        learning_rate=config.optimizer.learning_rate,
        weight_decay=config.optimizer.weight_decay,
    )
    # Before accelerate prepares the optimizer: both replace its `step`, and the scheduler expects its own outermost.
    lr_scheduler = _make_lr_scheduler(config.optimizer, optimizer, length.steps)
    encode = LiveEncoder(sampling_pipeline(pipeline)) if config.learns_from_text else None
    batches = partial(_batches, config, accelerator, pipeline, inputs.encoder, objective.timesteps, encode)
    class_batches = partial(batches, seed=derived_seed(config.seed, "class"))
    run = TrainState(
        config=config,
        length=length,
        accelerator=accelerator,
        pipeline=pipeline,
        tuner=tuner,
        # Only the optimizer is prepared, because the tuner runs in hooks and the schedule counts optimizer steps.
        optimizer=accelerator.prepare(optimizer),
        lr_scheduler=lr_scheduler,
        cache=cache,
        batches=batches(
            cache,
            seed=config.seed,
            sampler=cached_feature_sampler(config.feature_cache, cache, config.seed),
            teacher=inputs.teacher_text,
        ),
        objective=objective,
        resolution=inputs.resolution,
        conditions=inputs.conditions,
        data=inputs.data,
        preservation=make_preservation(config.preservation.class_prompt, inputs.known_class, class_batches, encode),
        image_loss=_image_loss(config, tuner),
        initial=initial,
        vae=inputs.vae,
        held_out=inputs.held_out,
        teacher=inputs.teacher,
        metrics=inputs.metrics,
        average=TunerAverage(tuner, config.optimizer.ema_decay) if config.optimizer.ema_decay is not None else None,
    )
    checkpoint = latest_checkpoint(config.output) if config.checkpoints.resume else None
    if checkpoint is not None:
        restore_checkpoint(run, checkpoint)
    check_effect(run)
    return run


def tuner_autocast(mixed_precision: str, unet: Any) -> torch.dtype | None:
    """Return the dtype of autocast for the tuner alone, or None for autocast around the base and the tuner.

    A base in half precision needs no autocast, which would run its norms in fp32 and cast their results back. A
    pipeline passed as an argument may be in fp32; autocast then runs it in half precision.
    """
    dtype = PRECISIONS[mixed_precision]
    return dtype if dtype != torch.float32 and unet.dtype == dtype else None


def _batches(
    config: TrainConfig,
    accelerator: Accelerator,
    pipeline: Any,
    encoder: Any,
    timesteps: int,
    encode: LiveEncoder | None,
    cache: Cache,
    *,
    seed: int,
    sampler: SeededSampler | None = None,
    teacher: Mapping[str | None, Conditioning] | None = None,
) -> Batches:
    """Return the batches of a cache."""
    return Batches(
        cache,
        seed=seed,
        size=config.batch_size,
        timesteps=timesteps,
        caption_dropout=config.caption_dropout,
        device=accelerator.device,
        dtype=pipeline.unet.dtype,
        noising=_noising(config.noise),
        encode=encode,
        step_size=images_per_step(config, accelerator),
        unmasked_weight=config.data.unmasked_weight,
        inpainting=InpaintingInputs(encoder, cache.images) if cache.images else None,
        sampler=sampler,
        teacher=teacher,
    )


def _image_loss(config: TrainConfig, tuner: Tuner) -> Consistency | None:
    loss = config.loss
    if loss.consistency is None:
        return None
    sigma = DEFAULT_SIGMA if loss.consistency_sigma is None else loss.consistency_sigma
    return Consistency(tuner, loss.consistency, sigma, config.seed)


def _objective(config: LossConfig, scheduler: Any) -> Objective:
    return Objective(
        scheduler,
        config.snr_gamma,
        debiased_estimation=config.debiased_estimation,
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
    )


def _make_lr_scheduler(config: OptimizerConfig, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    return get_scheduler(
        config.lr_scheduler,
        optimizer,
        step_rules=config.lr_step_rules,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )


def _noising(config: NoiseConfig) -> Noising:
    return Noising(
        offset=config.noise_offset,
        perturbation=config.input_perturbation,
        sampling=config.timestep_sampling,
        logit_mean=config.logit_mean,
        logit_std=config.logit_std,
        low=config.min_timestep,
        high=config.max_timestep,
    )
