"""Evaluate all saved tuners of a finished, interrupted or running run, or of a sweep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data.captions import find_examples, read_examples
from ...data.data_sheet import FILE_NAME as DATA_FILE
from ...data.data_sheet import name_inside
from ...data.example import Example
from ...evaluation.report import Evaluation
from ...evaluation.sampling import Sampling, load_images, read_images
from ...evaluation.several import Material, evaluate_tuners
from ...pipelines.load_base import is_inpainting, sampling_pipeline
from ...utils.errors import DataError, RestuneError
from ..config.train_config import TrainConfig
from ..losses.objective import scheduler_changes
from .held_out import Split, hold_out
from .saved_tuners import SavedTuners


@dataclass(frozen=True)
class Overrides:
    """Values that replace those of the run; None keeps them."""

    data: Path | None = None
    training_images: Path | None = None
    prompts: Sequence[str] | None = None
    drift_prompts: Sequence[str] | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    limit: int | None = None
    batch_size: int = 16


def evaluate_run(saved: SavedTuners, pipeline: Any, output: Path, overrides: Overrides | None = None) -> Evaluation:
    """Evaluate the saved tuners of a run on its held-out images, or without any on its validation prompts.

    Args:
        saved: the tuners.
        pipeline: pipeline of the base, with no tuner loaded.
        output: folder for report.json, report.md and grid.png.
        overrides: values that replace those of the run.

    Raises:
        DataError: if the images of the run are gone, or those of another folder cannot be used.
        RestuneError: if there is nothing to generate, a tuner does not fit, or the extra `evaluate` is not installed.
    """
    given, config = overrides or Overrides(), saved.config
    if is_inpainting(pipeline):
        raise RestuneError("An inpainting base cannot generate images from a prompt alone, so nothing is measured.")
    validation = config.validation
    training, held_out = examples_of_run(config, given)
    material = Material(
        true=read_images(pipeline, given.data, given.limit)
        if given.data is not None
        else load_images(pipeline, held_out[: given.limit]),
        prompts=validation.prompts if given.prompts is None else given.prompts,
        training=load_images(pipeline, training),
        drift_prompts=config.drift_prompts if given.drift_prompts is None else given.drift_prompts,
    )
    sampling = Sampling(
        validation.steps if given.steps is None else given.steps,
        validation.guidance if given.guidance is None else given.guidance,
        validation.seed if given.seed is None else given.seed,
        given.batch_size,
    )
    sampler = sampling_pipeline(pipeline, scheduler_changes(config.loss.prediction_type))
    name = saved.folder.resolve().name
    settings = {"run": name, "base": Path(config.base).name}
    return evaluate_tuners(
        sampler, saved.files, output, material, sampling, title=f"Tuners of {name}", settings=settings
    )


def examples_of_run(config: TrainConfig, given: Overrides) -> tuple[list[Example], list[Example]]:
    """Return the training and the held-out examples of a run; none of a data folder that is gone and not needed."""
    holdout = config.validation.holdout
    if given.training_images is not None:
        # No image is generated from the captions of the training images, so a constant one is enough.
        training = find_examples(given.training_images, "any")
        if given.data is not None or holdout is None:
            return training, []
        return training, _split(config, given)[1]
    if not config.data.folder.exists() and (given.data is not None or holdout is None):
        return [], []
    return _split(config, given)


def _split(config: TrainConfig, given: Overrides) -> tuple[list[Example], list[Example]]:
    try:
        # A run on latents that its teacher generated has no images of its own.
        trained = [] if config.teacher.generates else read_examples(config.data, [])
        split = hold_out(config, trained, None, [])
    except DataError as error:
        raise DataError(f"{str(error).rstrip('.')}; or give held-out images with --data.") from error
    if given.data is None and not isinstance(config.validation.holdout, Path):
        _check_unchanged(config, split)
    return split.training, split.held_out


def _check_unchanged(config: TrainConfig, split: Split) -> None:
    """Refuse a data folder whose present images are held out differently than the run did by its `data.json`."""
    try:
        sheet = json.loads((config.output / DATA_FILE).read_text("utf-8"))
        trained, held_out = ({str(entry["name"]) for entry in sheet[key]} for key in ("files", "held_out"))
    except (OSError, ValueError, KeyError, TypeError):
        return
    now = {name_inside(str(example.path), split.folder) for example in split.held_out}
    changed = sorted((held_out - now) | (now & trained))
    if changed:
        raise DataError(
            f"The images of {config.data.folder} have changed since the run, and {changed[0]} would be "
            f"{'held out' if changed[0] in now else 'trained on'} now, unlike then; restore the folder, or give "
            f"held-out images with --data."
        )
