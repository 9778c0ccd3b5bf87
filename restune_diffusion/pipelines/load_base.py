"""Load a Stable Diffusion checkpoint as a pipeline that takes tuners, and tell what images it takes."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from safetensors import SafetensorError

from ..utils.errors import RestuneError, TrainingError
from .stable_diffusion import (
    RestuneStableDiffusionInpaintPipeline,
    RestuneStableDiffusionPipeline,
    RestuneStableDiffusionXLInpaintPipeline,
    RestuneStableDiffusionXLPipeline,
)

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

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
        RestuneError: if there is no such checkpoint, it is of another kind, or a text encoder's file lacks weights.
    """
    is_local = Path(base).expanduser().exists()
    if not is_local and not _HUB_ID.fullmatch(base):
        raise RestuneError(f"There is no base at {base}; give a checkpoint directory or the id of a hub repository.")
    source = str(Path(base).expanduser()) if is_local else base
    try:
        index = DiffusionPipeline.load_config(source)
        class_name = index["_class_name"]
        kind = _KINDS.get(class_name)
        if kind is None:
            raise RestuneError(
                f"The base {base} is a {class_name}; tuners are for Stable Diffusion and its XL version."
            )
        with warnings.catch_warnings():
            # The newest diffusers calls the argument `dtype`, older ones know only `torch_dtype`.
            warnings.filterwarnings("ignore", ".*torch_dtype.*", FutureWarning)
            encoders = _load_text_encoders(source, index, dtype)
            return kind.from_pretrained(source, torch_dtype=dtype, **encoders)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RestuneError(f"The base {base} cannot be loaded: {reason}") from error


def _load_text_encoders(source: str, index: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Load the text encoders of a checkpoint, and refuse those whose files lack weights.

    transformers fills such weights at random, with a warning at most. Version 4 does so with every weight of a CLIP
    encoder that version 5 built and saved, because that file's keys have no `text_model.` prefix.
    """
    encoders = {}
    for name, entry in index.items():
        if not name.startswith("text_encoder") or not isinstance(entry, list | tuple) or entry[0] != "transformers":
            continue
        model, report = getattr(transformers, entry[1]).from_pretrained(
            source, subfolder=name, torch_dtype=dtype, output_loading_info=True
        )
        if missing := sorted(report["missing_keys"]):
            raise RestuneError(
                f"The base {source} cannot be loaded: `{name}` lacks {len(missing)} weights that transformers "
                f"{transformers.__version__} expects, such as `{missing[0]}`. If transformers 5 wrote this "
                "checkpoint, use transformers 5 or later; otherwise download the checkpoint again."
            )
        encoders[name] = model
    return encoders


def is_inpainting(pipeline: Any) -> bool:
    """Whether the U-Net takes a mask and a masked picture beside the noisy latent."""
    return bool(pipeline.unet.config.in_channels == 2 * pipeline.vae.config.latent_channels + 1)


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
