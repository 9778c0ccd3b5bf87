"""Callback that generates validation samples from a tuner file with the pipeline, as users do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import nn

from ...hooks.manager import TunerManager
from ...imaging.contact_sheet import labelled_grid
from ...pipelines.load_base import sampling_pipeline
from ...storage.tuner_file import save_tuner
from ..config.validation import ValidationConfig
from ..frozen_base import move_encoders
from ..latents.inpainting import masked_image, validation_inputs
from ..state import StepReport, TrainState
from .base import Callback

_NAME = "validation sample"


class ValidationSamples(Callback):
    """Generate samples of the validation prompts at the start, every `validation.every` steps, and at the end.

    Place it after `FinalFile`: the last samples are generated from the finished file.

    Args:
        control_images: condition images of each prompt by name, for a control tuner.
        start: samples of the first step, shared by runs that all start as the base; the first of them fills the list.
    """

    def __init__(
        self, control_images: Sequence[Mapping[str, Image.Image]] = (), start: list[Image.Image] | None = None
    ) -> None:
        self.folders: list[Path] = []
        self._control_images = control_images
        self._start = start
        self._last: int | None = None

    def on_start(self, run: TrainState) -> None:
        """Generate samples before the first step, unless the run is resumed."""
        if run.step == 0:
            self._sample_from_state(run)

    def reads_state(self, run: TrainState, step: int) -> bool:
        """Return whether samples are due: every `validation.every` steps, except after the last step."""
        return bool(run.config.validation.prompts) and run.config.validation.due(step) and step < run.steps

    def on_step(self, run: TrainState, report: StepReport) -> None:
        """Generate samples if they are due."""
        if self.reads_state(run, report.step):
            self._sample_from_state(run)

    def on_end(self, run: TrainState) -> None:
        """Generate samples from the finished file, unless a run that stops early has them already."""
        if run.stopped_early is None or self._last != run.step:
            self._sample(run, run.config.file)

    def sample(self, run: TrainState) -> None:
        """Generate samples from the state after a step, unless they exist."""
        if self._last != run.step:
            self._sample_from_state(run)

    def _sample_from_state(self, run: TrainState) -> None:
        if run.step == 0 and self._start:
            self._write(run, self._start)
        elif run.config.validation.prompts and run.accelerator.is_main_process:
            with TemporaryDirectory(dir=run.config.output, prefix=".sample-", suffix=".tmp") as folder:
                file = Path(folder) / "tuner.safetensors"
                with run.released_weights():
                    save_tuner(run.tuner, file)
                self._sample(run, file)
        run.accelerator.wait_for_everyone()

    def _sample(self, run: TrainState, file: Path) -> None:
        if not run.config.validation.prompts or not run.accelerator.is_main_process:
            return
        validation = run.config.validation
        changes = run.objective.scheduler_changes
        inpainting = validation_inputs(run.cache.images, len(validation.prompts), validation.seed)
        images = generate_samples(
            run.pipeline, file, validation, run.accelerator.device, self._control_images, changes, inpainting
        )
        if run.step == 0 and self._start is not None:
            self._start += images
        self._write(run, images)

    def _write(self, run: TrainState, images: Sequence[Image.Image]) -> None:
        self._last = run.step
        validation = run.config.validation
        inpainting = validation_inputs(run.cache.images, len(validation.prompts), validation.seed)
        folder = run.config.output / "samples" / f"step-{run.step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images):
            image.save(folder / f"{number:02d}.png")
        shown = [dict(conditions) for conditions in self._control_images or [{} for _ in images]]
        for number, inputs in enumerate(inpainting):
            shown[number] |= {"masked": masked_image(**inputs)}
        rows = [[*conditions.values(), image] for conditions, image in zip(shown, images, strict=True)]
        sheet = labelled_grid(rows, validation.prompts, [*shown[0], f"step {run.step}"])
        sheet.save(folder / "sheet.png")
        self.folders.append(folder)


def generate_samples(
    pipeline: Any,
    file: Path,
    config: ValidationConfig,
    device: torch.device,
    control_images: Sequence[Mapping[str, Image.Image]] = (),
    scheduler_changes: Mapping[str, Any] | None = None,
    inpainting: Sequence[Mapping[str, Image.Image]] = (),
) -> list[Image.Image]:
    """Generate one image per prompt with the tuner in a file; other tuners on the base are disabled.

    Sampling has its own random generator, so it does not change training.

    Args:
        pipeline: the base's pipeline.
        file: the tuner file.
        config: prompts, steps, guidance and seed.
        device: device of the encoders during sampling.
        control_images: condition images of each prompt by name, for a control tuner.
        scheduler_changes: scheduler settings that differ from the base's.
        inpainting: `image` and `mask_image` of each prompt, for an inpainting base.
    """
    sampler = sampling_pipeline(pipeline, scheduler_changes)
    images = []
    with only_tuner(sampler, file), encoders_on(pipeline, device):
        for number, prompt in enumerate(config.prompts):
            result = sampler(
                prompt,
                tuner_image=control_images[number] if control_images else None,
                num_inference_steps=config.steps,
                guidance_scale=config.guidance,
                generator=torch.Generator("cpu").manual_seed(config.seed),
                # Strength 1 ignores the original content of the masked area.
                **({**inpainting[number], "strength": 1.0} if inpainting else {}),
            )
            images.append(result.images[0])
    return images


@contextmanager
def only_tuner(sampler: Any, file: Path) -> Iterator[None]:
    """Context manager that loads a tuner file as the only active tuner, and restores the others' weights at exit."""
    before = sampler.get_list_tuners()
    sampler.load_tuner_weights(file, tuner_name=_NAME)
    try:
        sampler.set_tuners(_NAME)
        yield
    finally:
        sampler.delete_tuners(_NAME)
        manager = TunerManager.of(sampler.unet)
        if manager is not None:
            manager.set_weights(before)


@contextmanager
def encoders_on(pipeline: Any, device: torch.device) -> Iterator[None]:
    """Context manager that moves the encoders, which training steps do not need, to the device."""
    models = {name: model for name, model in pipeline.components.items() if isinstance(model, nn.Module)}
    before = {name: next(model.parameters()).device for name, model in models.items()}
    move_encoders(pipeline, device)
    try:
        yield
    finally:
        for name, model in models.items():
            model.to(before[name])
