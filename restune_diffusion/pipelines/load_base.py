"""Load a Stable Diffusion checkpoint as a pipeline with tuners; its training resolution and sampling pipeline."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import SafetensorError

from ..storage.base_files.check import check_class
from ..storage.base_files.location import local_base
from ..utils.errors import RestuneError, TrainingError
from .single_file import load_single_file
from .stable_diffusion import (
    RestuneStableDiffusionInpaintPipeline,
    RestuneStableDiffusionPipeline,
    RestuneStableDiffusionXLInpaintPipeline,
    RestuneStableDiffusionXLPipeline,
)
from .vae import load_vae

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_PIPELINES: dict[str, Any] = {
    "StableDiffusionPipeline": RestuneStableDiffusionPipeline,
    "StableDiffusionInpaintPipeline": RestuneStableDiffusionInpaintPipeline,
    "StableDiffusionXLPipeline": RestuneStableDiffusionXLPipeline,
    "StableDiffusionXLInpaintPipeline": RestuneStableDiffusionXLInpaintPipeline,
}
# Checkpoints may also have been saved from one of our own classes.
_PIPELINES |= {pipeline_class.__name__: pipeline_class for pipeline_class in _PIPELINES.values()}


def load_base(base: str, dtype: torch.dtype, vae: str | None = None) -> Any:
    """Load a Stable Diffusion checkpoint as a pipeline with `RestuneLoaderMixin`.

    Args:
        base: a directory in diffusers' layout, a single safetensors file in the original layout, or a repository id on
            the Hub.
        dtype: dtype of all models.
        vae: VAE that replaces that of the checkpoint: a folder, a safetensors file, or a repository id.

    Raises:
        RestuneError: if the checkpoint does not exist, is not a supported base, or lacks weights.
    """
    path = local_base(base)
    if path is not None and path.is_file():
        return load_single_file(path, dtype, vae)
    source = base if path is None else str(path)
    try:
        index = DiffusionPipeline.load_config(source)
        class_name = index["_class_name"]
        check_class(base, class_name)
        pipeline_class = _PIPELINES[class_name]
        with warnings.catch_warnings():
            # The latest diffusers names the argument `dtype`, older versions only accept `torch_dtype`.
            warnings.filterwarnings("ignore", ".*torch_dtype.*", FutureWarning)
            parts = _load_text_encoders(source, index, dtype)
            if vae is not None:
                parts["vae"] = _load_other_vae(vae, source, dtype)
            return pipeline_class.from_pretrained(source, torch_dtype=dtype, **parts)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RestuneError(f"The base {base} cannot be loaded: {reason}") from error


def load_placed(
    base: str,
    device: Literal["auto", "cpu", "cuda", "mps"],
    dtype: Literal["auto", "fp32", "fp16", "bf16"],
    vae: str | None = None,
) -> Any:
    """Load a base as a pipeline that supports tuners.

    Args:
        base: a directory, or a hub repository id.
        device: compute device; `auto` uses a GPU if there is one.
        dtype: precision; `auto` is fp16 on a GPU and fp32 on the CPU.
        vae: VAE that replaces that of the base.

    Raises:
        RestuneError: if the base or the device does not exist.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise RestuneError("No CUDA device is available; use --device cpu.")
    automatic = torch.float32 if device == "cpu" else torch.float16
    dtypes = {"auto": automatic, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return load_base(base, dtypes[dtype], vae).to(device)


def _load_other_vae(vae: str, source: str, dtype: torch.dtype) -> Any:
    own = AutoencoderKL.load_config(source, subfolder="vae")
    # The U-Net of an inpainting model has more inputs than latent channels, but as many outputs.
    channels = UNet2DConditionModel.load_config(source, subfolder="unet")["out_channels"]
    return load_vae(vae, dtype, replaced=own, channels=channels)


def _load_text_encoders(source: str, index: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Load the text encoders of a checkpoint, and raise `RestuneError` if a file lacks weights.

    transformers initializes missing weights at random, at most with a warning. Version 4 does so for every weight of a
    CLIP encoder that version 5 has saved, because the keys of that file have no `text_model.` prefix.
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
    """Return whether the U-Net takes a mask and a masked image in addition to the noisy latent."""
    return bool(pipeline.unet.config.in_channels == 2 * pipeline.vae.config.latent_channels + 1)


def training_resolution(pipeline: Any, asked: int | None) -> int:
    """Return the training resolution, the side of the images in pixels; by default that of the base.

    Raises:
        TrainingError: if the base does not support this resolution.
    """
    size = pipeline.unet.config.sample_size
    native = (size if isinstance(size, int) else min(size)) * pipeline.vae_scale_factor
    resolution = native if asked is None else asked
    # The downsampling of the autoencoder and of all U-Net levels must divide the resolution.
    stride = pipeline.vae_scale_factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
    if resolution % stride:
        nearest = max(stride, round(resolution / stride) * stride)
        raise TrainingError(
            f"A resolution of {resolution} does not fit this base; use a multiple of {stride}, for example {nearest}."
        )
    return resolution


def sampling_pipeline(pipeline: Any, scheduler_changes: Mapping[str, Any] | None = None) -> Any:
    """Return a new pipeline with `RestuneLoaderMixin` that shares the models and has its own scheduler.

    Args:
        pipeline: pipeline of the base.
        scheduler_changes: scheduler settings that differ from the base's; if its scheduler class does not have them,
            DDIM is used instead.
    """
    pipeline_class = _sampling_class(pipeline)
    _, options = pipeline_class._get_signature_keys(pipeline_class)
    settings = {key: pipeline.config[key] for key in options if key in pipeline.config}
    changes = scheduler_changes or {}
    known = inspect.signature(type(pipeline.scheduler).__init__).parameters
    scheduler_class = type(pipeline.scheduler) if changes.keys() <= known.keys() else DDIMScheduler
    scheduler = scheduler_class.from_config(pipeline.scheduler.config, **changes)
    sampler = pipeline_class(**{**pipeline.components, "scheduler": scheduler}, **settings)
    sampler.set_progress_bar_config(disable=True)
    return sampler


def _sampling_class(pipeline: Any) -> Any:
    """Return the pipeline class for a U-Net; an inpainting pipeline may contain a text-to-image U-Net."""
    if isinstance(pipeline, StableDiffusionXLPipeline | StableDiffusionXLInpaintPipeline):
        return RestuneStableDiffusionXLInpaintPipeline if is_inpainting(pipeline) else RestuneStableDiffusionXLPipeline
    return RestuneStableDiffusionInpaintPipeline if is_inpainting(pipeline) else RestuneStableDiffusionPipeline
