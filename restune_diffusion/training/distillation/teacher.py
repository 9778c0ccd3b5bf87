"""Teacher of a distillation: a tuner of any family, or a LoRA file of another program, on the base of the student."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...backbones import describe_base, describe_text, text_encoders
from ...conversion.bases import checkpoint_weights
from ...conversion.convert import is_tuner_file
from ...conversion.formats import import_tuner
from ...data.example import Example
from ...hooks.attachment import attach
from ...hooks.manager import TunerManager
from ...hooks.placeholder_tokens import contains_token
from ...storage.header import phrase_words
from ...storage.tuner_file import load_tuner, read_info
from ...tuners.registry import ConditionedConfig, PartConfig
from ...tuners.tuner import Tuner
from ...utils.errors import BaseMismatchError, TrainingError
from ..config.teacher.files import check_teacher_files, teacher_location
from ..config.teacher.settings import TeacherConfig

logger = logging.getLogger(__name__)

TEACHER_NAME = "teacher"
"""Name under which the teacher is attached to the base."""
_LARGEST = 10.0


@dataclass(frozen=True)
class TeacherRecord:
    """Facts about a teacher that the student's file records; they contain no local paths."""

    file: str
    sha256: str
    weight: float
    loss_weight: float
    trigger_words: tuple[str, ...] = ()
    prompts: int | None = None
    """Number of distinct prompts of generated latents; None for training on images."""
    latents: int | None = None
    """Number of generated latents; None for training on images."""

    def as_json(self) -> dict[str, Any]:
        """Return the facts as plain JSON values."""
        return {name: value for name, value in asdict(self).items() if value not in (None, ())}


@dataclass(frozen=True)
class Teacher:
    """Frozen teacher.

    `denoiser` has its parts on the denoiser, or is None if there are none. `tuner` is the whole teacher, which encodes
    prompts before training.
    """

    tuner: Tuner = field(repr=False)
    denoiser: Tuner | None = field(repr=False)
    record: TeacherRecord

    @property
    def acts_on_text(self) -> bool:
        """Whether a part acts on the text encoders."""
        return any(config.acts_on_text_encoders for config in self.tuner.configs)

    def describe(self) -> str:
        """Return a line for the plan of a run."""
        record = self.record
        share = "" if record.loss_weight == 1 else f", {record.loss_weight:g} of the loss"
        parts = " + ".join(config.part for config in self.tuner.configs)
        return f"{record.file} ({parts}), weight {record.weight:g}{share}"

    @contextmanager
    def attached_whole(self, pipeline: Any) -> Iterator[None]:
        """Context manager in which the whole teacher acts on a pipeline, as in generation."""
        with attach(pipeline.unet, self.tuner, TEACHER_NAME, self.record.weight, text=text_encoders(pipeline)):
            yield

    @contextmanager
    def attached(self, unet: Any) -> Iterator[None]:
        """Context manager in which the parts on the denoiser are attached with weight 0; see `acting`."""
        with attach(unet, self.denoiser, TEACHER_NAME, 0.0) if self.denoiser is not None else nullcontext():
            yield

    @contextmanager
    def acting(self, unet: Any) -> Iterator[None]:
        """Context manager in which the attached teacher is the only active tuner, without gradients."""
        manager = TunerManager.of(unet)
        if manager is None:
            with torch.no_grad():
                yield
            return
        before = manager.weights
        manager.set_weights({} if self.denoiser is None else {TEACHER_NAME: self.record.weight})
        try:
            with torch.no_grad():
                yield
        finally:
            manager.set_weights(before)


def check_teacher(config: TeacherConfig) -> None:
    """Check the files of the teacher and its weight, before the base is loaded.

    Raises:
        TrainingError: if the weight cannot be used, or the teacher is a control tuner.
        TunerFileError: if there is no teacher.
        DataError: if there is no file of prompts.
    """
    if config.file is None:
        return
    check_teacher_files(config)
    path, weight = teacher_location(config.file)
    if not math.isfinite(weight) or weight == 0 or abs(weight) > _LARGEST:
        raise TrainingError(
            f"The teacher {path} has the weight {weight:g}; give one between -{_LARGEST:g} and {_LARGEST:g} that is "
            f"not 0."
        )
    if is_tuner_file(path):
        _refuse_control(path, read_info(path).configs)


def load_teacher(config: TeacherConfig, pipeline: Any, base: str, examples: Sequence[Example]) -> Teacher | None:
    """Load the teacher for a pipeline; returns None if there is none.

    Args:
        config: settings of the teacher.
        pipeline: pipeline of the base.
        base: checkpoint of the base, whose weights a DoRA file needs.
        examples: training images, or prompts to generate from.

    Raises:
        TunerFileError: if the file cannot be read, or no tuner family represents it.
        BaseMismatchError: if it is for a base of another structure.
        TrainingError: if it is a control tuner, or has placeholder tokens that no caption contains.
    """
    if config.file is None:
        return None
    path, weight = teacher_location(config.file)
    described = describe_base(pipeline.unet)
    encoders = text_encoders(pipeline)
    try:
        if is_tuner_file(path):
            tuner, words = load_tuner(path), read_info(path).trigger_words
        else:
            with_text = described.model_copy(update={"text": describe_text(encoders)})
            tuner = import_tuner(path, with_text, base_weights=checkpoint_weights(base))
            words = phrase_words(tuner.metadata)
        tuner.base.check_fits(described)
        if tuner.base.text:
            tuner.base.check_text_fits(describe_text(encoders))
    except BaseMismatchError as error:
        raise BaseMismatchError(f"{path} cannot be the teacher of this run: {error}") from error
    _refuse_control(path, tuner.configs)
    _check_words(path, tuner.configs, words, examples)
    tuner.to(pipeline.unet.device, pipeline.unet.dtype).requires_grad_(False).eval()
    file = path if path.is_file() else next(iter(sorted(path.glob("*.safetensors"))))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    counts = (len({example.caption for example in examples}), len(examples)) if config.generates else (None, None)
    record = TeacherRecord(path.name, digest, weight, config.loss_weight, tuple(words), *counts)
    return Teacher(tuner, _on_denoiser(tuner), record)


def _refuse_control(path: Path, configs: Sequence[PartConfig]) -> None:
    if any(isinstance(config, ConditionedConfig) for config in configs):
        raise TrainingError(
            f"The teacher {path} is a control tuner, whose predictions depend on condition images, which distillation "
            f"does not have; give a tuner of another family."
        )


def _check_words(path: Path, configs: Sequence[PartConfig], words: Sequence[str], examples: Sequence[Example]) -> None:
    """Raise `TrainingError` without captions with a placeholder token, and warn without ones with a trigger word."""

    def missing(wanted: Sequence[str]) -> bool:
        return bool(wanted) and not any(contains_token(example.caption, wanted) for example in examples)

    tokens = [token for config in configs for token in config.new_words]
    if missing(tokens):
        raise TrainingError(
            f"No prompt or caption contains {' or '.join(tokens)}, the placeholder token of the teacher {path}, so "
            f"there is nothing to learn from it; add it to some of them."
        )
    if missing(words):
        logger.warning(
            "No prompt or caption contains %s, the trigger word of the teacher %s; add it to the prompts, or its "
            "effect may be weak.",
            " or ".join(words),
            path,
        )


def _on_denoiser(tuner: Tuner) -> Tuner | None:
    """Return the tuner without the parts on text encoders, with the same parameters; None if nothing remains."""
    configs = tuple(config for config in tuner.configs if not config.acts_on_text_encoders)
    if len(configs) == len(tuner.configs) or not configs:
        return tuner if configs else None
    rest = Tuner.empty(configs, tuner.base)
    own = tuner.state_dict()
    rest.load_state_dict({name: own[name] for name in rest.state_dict()}, assign=True)
    return rest.requires_grad_(False).eval()
