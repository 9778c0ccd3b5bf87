"""Load the base of a training run and keep it frozen."""

from __future__ import annotations

import inspect
import re
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from safetensors import SafetensorError
from torch import nn

from ..hooks.manager import TunerManager
from ..pipelines import (
    RestuneStableDiffusionInpaintPipeline,
    RestuneStableDiffusionPipeline,
    RestuneStableDiffusionXLInpaintPipeline,
    RestuneStableDiffusionXLPipeline,
)
from ..utils.errors import RestuneError, TrainingError
from .inpainting import is_inpainting

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_T = TypeVar("_T")

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_KINDS: dict[str, Any] = {
    "StableDiffusionPipeline": RestuneStableDiffusionPipeline,
    "StableDiffusionInpaintPipeline": RestuneStableDiffusionInpaintPipeline,
    "StableDiffusionXLPipeline": RestuneStableDiffusionXLPipeline,
    "StableDiffusionXLInpaintPipeline": RestuneStableDiffusionXLInpaintPipeline,
}
# A pipeline that was saved from one of our own classes is as good.
_KINDS |= {kind.__name__: kind for kind in _KINDS.values()}


def load_base(base: str, dtype: torch.dtype) -> Any:
    """Load a Stable Diffusion checkpoint in diffusers' layout as a pipeline that takes tuners.

    Args:
        base: a directory, or the id of a hub repository.
        dtype: dtype of all models.

    Raises:
        RestuneError: if there is no such checkpoint, or it is of another kind.
    """
    is_local = Path(base).expanduser().exists()
    if not is_local and not _HUB_ID.fullmatch(base):
        raise RestuneError(f"There is no base at {base}; give a checkpoint directory or the id of a hub repository.")
    source = str(Path(base).expanduser()) if is_local else base
    try:
        class_name = DiffusionPipeline.load_config(source)["_class_name"]
        kind = _KINDS.get(class_name)
        if kind is None:
            raise RestuneError(
                f"The base {base} is a {class_name}; tuners are for Stable Diffusion and its XL version."
            )
        with warnings.catch_warnings():
            # The newest diffusers calls the argument `dtype`, older ones know only `torch_dtype`.
            warnings.filterwarnings("ignore", ".*torch_dtype.*", FutureWarning)
            return kind.from_pretrained(source, torch_dtype=dtype)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RestuneError(f"The base {base} cannot be loaded: {reason}") from error


def check_trainable(pipeline: Any) -> None:
    """Refuse a pipeline whose denoiser cannot be trained here.

    Raises:
        TrainingError: if it is for neither text-to-image nor inpainting, or has tuners attached.
    """
    latent_channels = pipeline.vae.config.latent_channels
    if pipeline.unet.config.in_channels != latent_channels and not is_inpainting(pipeline):
        raise TrainingError(
            f"The base's U-Net takes {pipeline.unet.config.in_channels} channels, but its latents have "
            f"{latent_channels}; train on a text-to-image checkpoint, which takes {latent_channels}, or an inpainting "
            f"checkpoint, which takes {2 * latent_channels + 1}. Its tuners fit this base too."
        )
    manager = TunerManager.of(pipeline.unet)
    if manager is not None:
        raise TrainingError(f"Take the tuners {', '.join(manager.names)} off the base before training another one.")


def training_resolution(pipeline: Any, asked: int | None) -> int:
    """Return the side of the training images in pixels.

    Raises:
        TrainingError: if the base cannot take images of this size.
    """
    size = pipeline.unet.config.sample_size
    native = (size if isinstance(size, int) else min(size)) * pipeline.vae_scale_factor
    resolution = native if asked is None else asked
    # The autoencoder's and every level's downsampling must divide the image evenly.
    stride = pipeline.vae_scale_factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
    if resolution % stride:
        nearest = max(stride, round(resolution / stride) * stride)
        raise TrainingError(
            f"A resolution of {resolution} does not fit this base; use a multiple of {stride}, for instance {nearest}."
        )
    return resolution


@contextmanager
def frozen(pipeline: Any) -> Iterator[None]:
    """Let no parameter of the pipeline require a gradient meanwhile, and put every module in eval mode."""
    modules = [component for component in pipeline.components.values() if isinstance(component, nn.Module)]
    trainable = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    training = [child for module in modules for child in module.modules() if child.training]
    for parameter in trainable:
        parameter.requires_grad_(False)
    for child in training:
        child.training = False
    # Weak, so that a model that is taken out of the pipeline meanwhile is freed.
    parameters, children = [weakref.ref(each) for each in trainable], [weakref.ref(each) for each in training]
    del modules, trainable, training
    try:
        yield
    finally:
        for parameter in _alive(parameters):
            parameter.requires_grad_(True)
        for child in _alive(children):
            child.training = True


def _alive(references: Iterable[weakref.ref[_T]]) -> list[_T]:
    return [each for reference in references if (each := reference()) is not None]


def sampling_pipeline(pipeline: Any, scheduler_changes: Mapping[str, Any] | None = None) -> Any:
    """Return a tuner-loading pipeline around the same models, with a scheduler and settings of its own.

    Args:
        pipeline: the base.
        scheduler_changes: settings of the scheduler that differ from the base's; where its kind of scheduler does not
            have them, DDIM takes its place.
    """
    kind = _sampling_kind(pipeline)
    _, options = kind._get_signature_keys(kind)
    settings = {key: pipeline.config[key] for key in options if key in pipeline.config}
    changes = scheduler_changes or {}
    known = inspect.signature(type(pipeline.scheduler).__init__).parameters
    scheduler_kind = type(pipeline.scheduler) if changes.keys() <= known.keys() else DDIMScheduler
    scheduler = scheduler_kind.from_config(pipeline.scheduler.config, **changes)
    sampler = kind(**{**pipeline.components, "scheduler": scheduler}, **settings)
    sampler.set_progress_bar_config(disable=True)
    return sampler


def _sampling_kind(pipeline: Any) -> Any:
    """The pipeline that draws with this U-Net; one for inpainting may well be around a text-to-image U-Net."""
    if isinstance(pipeline, StableDiffusionXLPipeline | StableDiffusionXLInpaintPipeline):
        return RestuneStableDiffusionXLInpaintPipeline if is_inpainting(pipeline) else RestuneStableDiffusionXLPipeline
    return RestuneStableDiffusionInpaintPipeline if is_inpainting(pipeline) else RestuneStableDiffusionPipeline


def move_encoders(pipeline: Any, device: torch.device, keep: Iterable[str] = ()) -> None:
    """Move every model but the denoiser; training needs them only to fill the cache and to draw samples.

    Args:
        pipeline: the pipeline.
        device: where to.
        keep: names of models that stay, because a part in training acts on them.
    """
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and name not in ("unet", *keep):
            component.to(device)
