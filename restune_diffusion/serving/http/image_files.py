"""Encode generated images with the record of how they were generated."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...imaging.generation_record import a1111_text, png_chunks, with_user_comment
from ...utils.version import __version__
from ..tickets import GeneratedImage

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_QUALITY = 95


@dataclass(frozen=True)
class FileFormat:
    """Format of the image files of a response."""

    name: str = "png"
    """`png`, `jpeg` or `webp`."""
    quality: int = DEFAULT_QUALITY
    """Quality of JPEG and WebP, from 0 to 100."""


@dataclass(frozen=True)
class BaseFacts:
    """Facts about the base that records name."""

    name: str
    """Public name: a folder's or file's last part, or a hub id."""
    sampler: str
    """A1111's name of the base's own scheduler, or its class."""
    spacing: str | None
    """Spacing of its sigmas, if it is not the default."""
    size: tuple[int, int]
    """Native width and height."""
    factor: int
    """Width and height are multiples of this."""
    dtype: str
    device: str


def encode_image(image: Image.Image, file_format: FileFormat, facts: dict[str, Any], text: str) -> bytes:
    """Return an image file.

    Args:
        image: the image.
        file_format: format of the file.
        facts: record as JSON values; only PNG files contain it.
        text: record as A1111's text.
    """
    stream = io.BytesIO()
    if file_format.name == "png":
        image.save(stream, format="PNG", pnginfo=png_chunks(facts, text))
    else:
        exif = with_user_comment(text)
        image.convert("RGB").save(stream, format=file_format.name.upper(), quality=file_format.quality, exif=exif)
    return stream.getvalue()


def record_of(generated: GeneratedImage, base: BaseFacts, prompt: str | None = None) -> tuple[dict[str, Any], str]:
    """Return the record of a generated image, as JSON values and as A1111's text.

    Args:
        generated: the image.
        base: facts about the base.
        prompt: prompt of A1111's text, if it differs from that of the request.
    """
    request = generated.request
    sampler, spacing = _sampler(request.scheduler, base)
    size = generated.image.size
    strength = request.strength if request.image is not None else None
    facts: dict[str, Any] = {
        "restune_diffusion": __version__,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt or None,
        "seed": generated.seed,
        "steps": request.steps,
        "guidance": request.guidance,
        "width": size[0],
        "height": size[1],
        "scheduler": request.scheduler,
        "base": {"name": base.name},
        "tuners": [{"name": name, "weight": weight} for name, weight in request.tuners],
        "strength": strength,
        "device": base.device,
        "dtype": base.dtype,
    }
    pairs = {
        "Steps": request.steps,
        "Sampler": sampler,
        "Schedule type": spacing,
        "CFG scale": f"{request.guidance:g}",
        "Seed": generated.seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": base.name,
        "Denoising strength": strength,
        "RNG": "CPU",
        "Tuners": ", ".join(f"{name}: {weight:g}" for name, weight in request.tuners).replace('"', "") or None,
        "Version": f"restune-diffusion {__version__}",
    }
    return facts, a1111_text(request.prompt if prompt is None else prompt, request.negative_prompt, pairs)


def _sampler(scheduler: str | None, base: BaseFacts) -> tuple[str, str | None]:
    from ...pipelines.schedulers import sampler_labels

    if scheduler is None:
        return base.sampler, base.spacing
    labels = sampler_labels()
    if scheduler in labels:
        return labels[scheduler], None
    name, _, spacing = scheduler.rpartition("_")
    return labels[name], spacing.capitalize()
