"""Inputs of training runs, which several runs may share: the base and the encoded data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from ..backbones import text_encoders
from ..data.buckets import bucket_step
from ..data.captions import read_examples
from ..data.condition_source import ConditionSource
from ..data.data_sheet import DataSheet
from ..data.example import Example
from ..data.image_transform import ImageTransform
from ..hooks.placeholder_tokens import contains_token
from ..pipelines.load_base import PRECISIONS, is_inpainting, load_base, training_resolution
from ..utils.errors import TrainingError
from .callbacks.drift import DriftPrompt, encode_drift_prompts
from .config.train_config import TrainConfig
from .distillation.generated_data import generated_cache
from .distillation.prompts import prompt_examples
from .distillation.teacher import Teacher, load_teacher
from .distillation.teacher_text import encode_teacher_text
from .feature_cache.use import hash_of_models, hash_of_vae
from .frozen_base import check_trainable, frozen, move_encoders
from .initial_tuner import check_initial_tuner
from .latents.cache import Cache
from .latents.examples import encode_examples
from .latents.precision import held_encoder
from .latents.text_conditioning import Conditioning
from .losses.preservation import encode_class
from .memory import drop_encoders
from .quantization import quantize_base
from .validation.held_out import HeldOut, Split, encode_held_out, hold_out
from .validation.metric_inputs import MetricInputs, prepare_metrics


@dataclass(frozen=True)
class TrainingInputs:
    """Base pipeline, encoded data, and outputs of the base that are computed before a tuner is attached."""

    pipeline: Any
    cache: Cache
    data: DataSheet
    """Report of the images used and the images skipped."""
    resolution: int
    conditions: ConditionSource | None
    control_images: Sequence[Mapping[str, Image.Image]]
    """Control images for the validation samples of a control tuner: one mapping per prompt, by condition."""
    known_class: Cache | Conditioning | None
    """Data for preservation: encoded class images (`prior`) or the encoded class prompt (`output`)."""
    drift_prompts: Sequence[DriftPrompt]
    """Prompts on which the drift is measured, with the samples of the base."""
    models: str | None
    """Hash of the models, if a feature cache is used."""
    vae: str | None = None
    """Hash of the VAE that replaces that of the base, if one does."""
    encoder: Any = None
    """VAE that encodes the masked images of an inpainting base in each step."""
    held_out: HeldOut | None = None
    """Images that are held out of training, if any."""
    metrics: MetricInputs | None = None
    """What the metrics of checkpoints compare with, in the main process, if they are measured."""
    teacher: Teacher | None = None
    """Teacher of a distillation, attached to the base with weight 0."""
    teacher_text: Mapping[str | None, Conditioning] | None = None
    """Its text embeddings by caption, if it acts on the text encoders."""


@contextmanager
def prepared(
    config: TrainConfig, accelerator: Accelerator, pipeline: Any = None, *, verbose: bool = False
) -> Iterator[TrainingInputs]:
    """Context manager that loads the base, encodes the data, and restores the pipeline's state at the end.

    Args:
        config: settings of the run, or of any of several runs that share the inputs.
        accelerator: device and process of the run.
        pipeline: a loaded pipeline to use instead of loading `config.base`.
        verbose: whether to show a progress bar while class images are generated.

    Raises:
        DataError: if the images or captions cannot be used.
        TrainingError: if the pipeline cannot be trained on.
    """
    if config.memory.drop_encoders and pipeline is not None:
        raise TrainingError(
            "The encoders of a pipeline passed as an argument cannot be dropped; leave drop_encoders out."
        )
    if config.memory.base_quantization is not None and pipeline is not None:
        raise TrainingError("A pipeline passed as an argument is not quantized; leave base_quantization out.")
    if config.vae is not None and pipeline is not None:
        raise TrainingError("A pipeline passed as an argument has its own VAE; leave vae out, or set pipeline.vae.")
    generates = config.teacher.generates
    sheet = DataSheet(Path("generated latents") if generates else config.data.folder, [])
    if generates:
        examples = prompt_examples(config.teacher, config.data)
    else:
        examples = read_examples(config.data, sheet.refused, config.seed, config.new_words)
    conditions = ConditionSource(config.conditioned, config.control_data) if config.conditioned else None
    if conditions is not None:
        examples = conditions.paired(examples, config.data.folder)
    split = hold_out(config, examples, conditions, sheet.refused)
    _check_placeholder_tokens(config, split.training)
    if pipeline is None:
        pipeline = load_base(config.base, PRECISIONS[config.memory.mixed_precision], config.vae)
        if config.memory.base_quantization is not None:
            # Before the move to the device, so that the device never holds the unquantized weights.
            quantize_base(pipeline.unet)
    check_trainable(pipeline)
    check_initial_tuner(config, pipeline)
    teacher = load_teacher(config.teacher, pipeline, config.base, examples)
    inpainting = is_inpainting(pipeline)
    if config.memory.drop_encoders and inpainting:
        raise TrainingError("An inpainting base encodes masked images in each step; leave drop_encoders out.")
    resolution = training_resolution(pipeline, config.data.resolution)
    control_images = conditions.samples(config.validation.control_images, resolution) if conditions is not None else []
    pipeline.to(accelerator.device)
    with frozen(pipeline):
        if teacher is not None and generates:
            cache = generated_cache(config, accelerator, pipeline, teacher, examples, resolution, sheet, verbose)
        else:
            cache = _encode(config, accelerator, pipeline, split.training, resolution, conditions, sheet)
        held_out = _encode_held_out(config, accelerator, pipeline, split, resolution, sheet)
        teacher_text = encode_teacher_text(teacher, pipeline, cache.conditionings)
        known = encode_class(config, accelerator, pipeline, resolution, verbose=verbose)
        drift_prompts = _drift_prompts(config, pipeline, resolution) if accelerator.is_main_process else []
        metrics = prepare_metrics(config, accelerator, pipeline, [] if generates else split.training, held_out)
        models = hash_of_models(pipeline) if config.feature_cache.draws is not None else None
        vae = hash_of_vae(pipeline.vae) if config.vae is not None else None
        if config.memory.drop_encoders:
            drop_encoders(pipeline)
        encoder = held_encoder(pipeline.vae) if inpainting else None
        kept = (
            *(text_encoders(pipeline) if config.learns_from_text else ()),
            *(["vae"] if encoder is pipeline.vae else ()),
        )
        move_encoders(pipeline, torch.device("cpu"), keep=kept)
        try:
            with nullcontext() if teacher is None else teacher.attached(pipeline.unet):
                yield TrainingInputs(
                    pipeline,
                    cache,
                    sheet,
                    resolution,
                    conditions,
                    control_images,
                    known,
                    drift_prompts,
                    models,
                    vae,
                    encoder,
                    held_out,
                    metrics,
                    teacher,
                    teacher_text,
                )
        finally:
            move_encoders(pipeline, accelerator.device)


def _drift_prompts(config: TrainConfig, pipeline: Any, resolution: int) -> list[DriftPrompt]:
    prompts, prediction_type = config.drift_prompts, config.loss.prediction_type
    return encode_drift_prompts(prompts, config.validation, pipeline, resolution, prediction_type)


def _encode(
    config: TrainConfig,
    accelerator: Accelerator,
    pipeline: Any,
    examples: Sequence[Example],
    resolution: int,
    conditions: ConditionSource | None,
    sheet: DataSheet,
) -> Cache:
    """Encode the training images, and record the used and skipped images in the sheet."""
    transform = ImageTransform.of(config.data, resolution, bucket_step(pipeline), config.seed)
    folder = config.data.folder
    cache, own = encode_examples(accelerator, pipeline, examples, folder, resolution, transform, conditions)
    sheet.add([own])
    sheet.check()
    assert cache is not None
    vectors = {token: getattr(part, "vectors_per_token", 1) for part in config.parts for token in part.new_words}
    sheet.count_tokens([encoder.tokenizer for encoder in text_encoders(pipeline).values()], vectors)
    sheet.hint(config.data, resolution)
    return cache


def _encode_held_out(
    config: TrainConfig, accelerator: Accelerator, pipeline: Any, split: Split, resolution: int, sheet: DataSheet
) -> HeldOut | None:
    data = config.data.model_copy(update={"folder": split.folder})
    transform = ImageTransform.of(data, resolution, bucket_step(pipeline), config.seed)
    return encode_held_out(accelerator, pipeline, split, resolution, transform, sheet)


def _check_placeholder_tokens(config: TrainConfig, examples: Sequence[Example]) -> None:
    tokens = config.new_words
    texts = [text for example in examples for text in example.texts]
    missing = [token for token in tokens if not any(contains_token(text, [token]) for text in texts)]
    if missing:
        raise TrainingError(
            f"No caption contains the placeholder token {missing[0]}, so it cannot be trained; add it to the "
            f'captions, for instance with --prompt "a photo of {missing[0]}".'
        )
