"""A small random base with a folder of tuners of every family, and the image of a request by the pipeline alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import restune_diffusion
from restune_diffusion import BypassConfig, ControlConfig, ResConfig, SkipConfig, TextConfig, Tuner, save_tuner
from restune_diffusion.backbones import describe_base, describe_text, text_encoders
from restune_diffusion.conversion.formats import export_tuner, import_tuner
from restune_diffusion.pipelines.schedulers import named_scheduler
from restune_diffusion.serving import Engine, GeneratedImage, ImageRequest, Ticket
from restune_diffusion.storage.tuner_file import load_tuner

from .conftest import TWO_LEVELS, make_unet, randomize
from .tiny_pipelines import SIZE, TEXT_WIDTH, masks, pictures, sd_components, sdxl_components

TOLERANCE = 1e-4
SCHEDULERS = (None, "ddim", "euler", "euler_a", "dpmpp_2m", "unipc", "lcm")
STYLES = ("skip", "res", "bypass", "lora", "diffusers", "text", "words")
"""Tuners of the folder that need no condition image."""

_LORA = ResConfig(self_attention="lora", cross_attention="lora", feed_forward=None, width=4)
_CONFIGS: dict[str, Any] = {
    "skip": SkipConfig(ratio=0.5),
    "other": SkipConfig(ratio=0.25),
    "third": SkipConfig(ratio=0.5),
    "res": ResConfig(self_attention="adapter", cross_attention="attention", feed_forward="adapter", width=4),
    "bypass": BypassConfig(ratio=0.25),
    "lora": _LORA,
    "diffusers": _LORA,
    "control": ControlConfig(ratio=0.5),
    "text": TextConfig(rank=3, alpha=6.0),
    "words": TextConfig(tokens=("<dog>",), initializers=("dog",), rank=0),
}


def small_pipeline(**unet: Any) -> Any:
    """Return a Stable Diffusion pipeline whose U-Net has two levels, or a variant of it."""
    parts = {**sd_components(), "unet": _two_levels(**unet)}
    inpainting = unet.get("in_channels") == 9
    name = "RestuneStableDiffusionInpaintPipeline" if inpainting else "RestuneStableDiffusionPipeline"
    return _made(name, parts)


def small_xl_pipeline() -> Any:
    """Return a Stable Diffusion XL pipeline."""
    return _made("RestuneStableDiffusionXLPipeline", sdxl_components())


def write_tuners(pipeline: Any, folder: Path) -> None:
    """Write a tuner of each family, and LoRA files of kohya and diffusers, to a folder."""
    for seed, (name, config) in enumerate(_CONFIGS.items()):
        tuner = Tuner.for_pipeline(pipeline, config)
        randomize(tuner, seed, std=0.2)
        path = folder / f"{name}.safetensors"
        if config is _LORA:
            export_tuner(tuner, path, "kohya" if name == "lora" else "diffusers")
        else:
            save_tuner(tuner, path)


def alone(pipeline: Any, folder: Path, request: ImageRequest, seed: int) -> torch.Tensor:
    """Return the latents of a request by a call of the pipeline for its task, with nothing else on the base."""
    task = "" if request.image is None else "Img2Img" if request.mask is None else "Inpaint"
    xl = "XL" if "XL" in type(pipeline).__name__ else ""
    scheduler = pipeline.scheduler
    if request.scheduler is not None:
        scheduler = named_scheduler(request.scheduler, scheduler)
    parts = {**pipeline.components, "scheduler": scheduler}
    pipe = _made(f"RestuneStableDiffusion{xl}{task}Pipeline", parts)
    arguments: dict[str, Any] = {}
    size = {"width": request.width or SIZE, "height": request.height or SIZE}
    if task == "":
        arguments |= size
    else:
        arguments |= {"image": request.image, "strength": request.strength}
    if task == "Img2Img" and request.width:
        arguments["image"] = request.image.resize(tuple(size.values()), Image.Resampling.LANCZOS)
    if task == "Inpaint":
        arguments |= {"mask_image": request.mask, **size}
    try:
        for name, _ in request.active_tuners:
            pipe.load_tuner_weights(library_tuner(pipeline, folder / f"{name}.safetensors"), name)
        pipe.set_tuners([name for name, _ in request.active_tuners], [weight for _, weight in request.active_tuners])
        if "control" in dict(request.active_tuners):
            arguments["tuner_image"] = request.conditions
        return pipe(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            **arguments,
        )[0]
    finally:
        pipe.unload_tuner_weights()


def run(engine: Engine, arrivals: Sequence[tuple[int, ImageRequest]]) -> list[GeneratedImage]:
    """Submit each request before its step, and compute steps until all are done."""
    tickets: dict[int, Ticket] = {}
    for step in range(1 + max(arrival for arrival, _ in arrivals)):
        for place, (arrival, request) in enumerate(arrivals):
            if arrival == step:
                tickets[place] = engine.submit(request)
        engine.step()
    while engine.step():
        pass
    return [tickets[place].result(0) for place in range(len(arrivals))]


def assert_as_alone(pipeline: Any, folder: Path, results: Sequence[GeneratedImage]) -> None:
    """Assert that the latents are those of the pipeline alone, within rounding."""
    for result in results:
        expected = alone(pipeline, folder, result.request, result.seed)
        error = float((expected - result.latents).abs().max())
        assert error < TOLERANCE * max(1.0, float(expected.abs().max())), (error, result.request)


def gray(value: int, width: int = SIZE, height: int = SIZE) -> Image.Image:
    """Return an image with a gradient."""
    row = np.linspace(0, value, width, dtype=np.uint8)
    return Image.fromarray(np.repeat(np.tile(row, (height, 1))[..., None], 3, axis=2))


def image() -> Image.Image:
    """Return a random image."""
    return pictures(1)[0]


def mask() -> Image.Image:
    """Return a mask of the right half."""
    return masks(1)[0]


def library_tuner(pipeline: Any, path: Path) -> Tuner:
    """Return the tuner in a file of `write_tuners`; a LoRA file is converted."""
    if path.stem not in ("lora", "diffusers"):
        return load_tuner(path)
    text = describe_text(text_encoders(pipeline))
    return import_tuner(path, describe_base(pipeline.unet).model_copy(update={"text": text}))


def _two_levels(**changes: Any) -> Any:
    return make_unet(**{**TWO_LEVELS, "cross_attention_dim": TEXT_WIDTH, "sample_size": SIZE // 8, **changes})


def _made(name: str, parts: dict[str, Any]) -> Any:
    from .tiny_pipelines import KINDS_BY_NAME

    kind = KINDS_BY_NAME[name.removeprefix("Restune")]
    return kind.make(getattr(restune_diffusion, name), parts)
