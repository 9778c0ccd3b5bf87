"""Pipelines that share the engine's models, one for each task; a request gets a copy with its own scheduler."""

from __future__ import annotations

import copy
from typing import Any, Literal, TypeAlias

import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from ...pipelines.load_base import is_inpainting
from ...pipelines.loaders import RestuneLoaderMixin
from ...pipelines.schedulers import named_scheduler
from ...pipelines.stable_diffusion import (
    RestuneStableDiffusionImg2ImgPipeline,
    RestuneStableDiffusionInpaintPipeline,
    RestuneStableDiffusionPipeline,
    RestuneStableDiffusionXLImg2ImgPipeline,
    RestuneStableDiffusionXLInpaintPipeline,
    RestuneStableDiffusionXLPipeline,
)
from ...utils.errors import RestuneError
from ..errors import RequestRefused
from ..requests import ImageRequest

Task: TypeAlias = Literal["text", "image", "inpaint"]

_SD: dict[Task, Any] = {
    "text": RestuneStableDiffusionPipeline,
    "image": RestuneStableDiffusionImg2ImgPipeline,
    "inpaint": RestuneStableDiffusionInpaintPipeline,
}
_XL: dict[Task, Any] = {
    "text": RestuneStableDiffusionXLPipeline,
    "image": RestuneStableDiffusionXLImg2ImgPipeline,
    "inpaint": RestuneStableDiffusionXLInpaintPipeline,
}
_SD_CLASSES = (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline)
_XL_CLASSES = (StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline)


class PipelineViews:
    """Pipelines of one base for the tasks that it supports.

    Args:
        pipeline: a pipeline of Stable Diffusion 1.x, 2.x or XL with `RestuneLoaderMixin`.

    Raises:
        RestuneError: if the pipeline is of another type, or has tuners loaded.
    """

    def __init__(self, pipeline: Any) -> None:
        is_sd, self.is_xl = isinstance(pipeline, _SD_CLASSES), isinstance(pipeline, _XL_CLASSES)
        if not isinstance(pipeline, RestuneLoaderMixin) or not (is_sd or self.is_xl):
            raise RestuneError(
                "The engine serves Stable Diffusion 1.x, 2.x and XL pipelines with RestuneLoaderMixin, but this is a "
                f"{type(pipeline).__name__}; load the base with load_base."
            )
        loaded = list(pipeline.get_list_tuners())
        if loaded:
            raise RestuneError(
                f"The pipeline has tuners loaded ({', '.join(loaded[:3])}), but the engine needs the base alone; "
                "unload them with unload_tuner_weights, and put their files into the library."
            )
        self.pipeline: Any = pipeline
        # Diffusers walks all modules at each look-up.
        self.device: torch.device = pipeline._execution_device
        self.takes_mask = is_inpainting(pipeline)
        tasks: list[Task] = ["inpaint"] if self.takes_mask else ["text", "image", "inpaint"]
        classes = _XL if self.is_xl else _SD
        self._views = {task: _shared(classes[task], pipeline) for task in tasks}
        self._schedulers: dict[str | None, Any] = {}

    def task(self, request: ImageRequest) -> Task:
        """Return the task of a request; raise `RequestRefused` if the base does not support it."""
        task: Task = "text" if request.image is None else "image" if request.mask is None else "inpaint"
        if task not in self._views:
            raise RequestRefused("This base is for inpainting; give an `image` and a `mask`.")
        return task

    def of(self, task: Task, scheduler: Any) -> Any:
        """Return a pipeline for one request, which shares everything except the scheduler."""
        view = copy.copy(self._views[task])
        # Bypasses the pipeline's `__setattr__`, which would register the scheduler in the shared config.
        vars(view)["scheduler"] = scheduler
        return view

    def scheduler(self, name: str | None, steps: int) -> Any:
        """Return a new scheduler, with its timesteps set.

        The timesteps stay on the host, where the schedulers look up their numbers without waiting for the device.

        Raises:
            RequestRefused: if the base does not support the scheduler, or the scheduler that number of steps.
        """
        try:
            if name not in self._schedulers:
                current = self.pipeline.scheduler
                self._schedulers[name] = (
                    type(current).from_config(current.config) if name is None else named_scheduler(name, current)
                )
            scheduler = copy.deepcopy(self._schedulers[name])
            scheduler.set_timesteps(steps, device="cpu")
        except RestuneError as error:
            raise RequestRefused(str(error)) from error
        except (ValueError, IndexError, ImportError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or ["it failed"])[0].rstrip(".")
            raise RequestRefused(
                f"The scheduler {name or type(self.pipeline.scheduler).__name__} does not support {steps} steps: "
                f"{reason}."
            ) from error
        return scheduler


def _shared(pipeline_class: Any, pipeline: Any) -> Any:
    """Return a pipeline of another class with the same models and settings."""
    accepted, options = pipeline_class._get_signature_keys(pipeline_class)
    settings = {key: pipeline.config[key] for key in options if key in pipeline.config}
    parts = {name: part for name, part in pipeline.components.items() if name in {*accepted, *options}}
    if "requires_safety_checker" in settings:
        settings["requires_safety_checker"] = pipeline.components.get("safety_checker") is not None
    view = pipeline_class(**{**settings, **parts})
    view.set_progress_bar_config(disable=True)
    return view
