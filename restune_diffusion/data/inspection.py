"""Inspect a data folder without training: used images, sizes, captions and skipped files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from ..imaging.contact_sheet import captioned_grid
from ..pipelines.load_base import training_resolution
from ..utils.display import counted
from ..utils.errors import RestuneError
from .buckets import bucket_step
from .captions import read_examples
from .config import DataConfig
from .data_sheet import DataSheet
from .image_transform import ImageTransform
from .training_images import Sample, load_samples

# Native size and bucket step of Stable Diffusion 1.x; used if no base is given.
_RESOLUTION, _STEP = 512, 64
_COLUMNS, _SHOWN = 6, 60
_CELL = 192


@dataclass(frozen=True)
class Frame:
    """Properties of a base that determine how images are cropped and captions tokenized.

    Attributes:
        resolution: side of the square, in pixels.
        step: step of the bucket sizes, in pixels.
        tokenizers: tokenizers of the base's text encoders.
    """

    resolution: int
    step: int
    tokenizers: tuple[Any, ...] = ()


def read_frame(base: str | None, resolution: int | None) -> Frame:
    """Return the frame of a base from its configs, without loading weights; Stable Diffusion 1.x without a base.

    Raises:
        RestuneError: if the base does not exist, or does not support this resolution.
    """
    if base is None:
        return Frame(resolution or _RESOLUTION, _STEP)
    from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTokenizer

    try:
        unet = UNet2DConditionModel.load_config(base, subfolder="unet")
        levels = AutoencoderKL.load_config(base, subfolder="vae")["block_out_channels"]
        parts = DiffusionPipeline.load_config(base)
        names = [name for name in ("tokenizer", "tokenizer_2") if parts.get(name, (None,))[0] is not None]
        tokenizers = tuple(CLIPTokenizer.from_pretrained(base, subfolder=name) for name in names)
    except (OSError, ValueError, KeyError) as error:
        raise RestuneError(f"The base {base} cannot be read: {str(error).strip().splitlines()[0]}") from error
    stand_in = SimpleNamespace(
        unet=SimpleNamespace(config=SimpleNamespace(**unet)), vae_scale_factor=2 ** (len(levels) - 1)
    )
    return Frame(training_resolution(stand_in, resolution), bucket_step(stand_in), tokenizers)


def inspect_data(config: DataConfig, frame: Frame, sheet: DataSheet, seed: int = 0) -> Image.Image:
    """Read the data of a config as training does.

    Args:
        config: settings of the data.
        frame: resolution, bucket step and tokenizers of the base.
        sheet: data sheet to fill with the used images and the skipped files. The skipped files are recorded even if
            an error is raised.
        seed: seed of the run; random crops depend on it.

    Returns:
        A contact sheet: cropped images of each size with their captions.

    Raises:
        DataError: if no image can be used.
    """
    examples = read_examples(config, sheet.refused, seed)
    preparation = ImageTransform.of(config, frame.resolution, frame.step, seed)
    samples = load_samples(examples, frame.resolution, preparation=preparation, refused=sheet.refused)
    thumbnails = Thumbnails(config.unmasked_weight)
    for _ in thumbnails.watched(sheet.watched(samples)):
        pass
    sheet.check()
    sheet.count_tokens(frame.tokenizers)
    sheet.hint(config, frame.resolution)
    return thumbnails.sheet()


def describe_data(sheet: DataSheet, most: int = 5) -> str:
    """Return a text summary of the used images and the skipped files.

    Args:
        sheet: a filled data sheet.
        most: maximum number of captions, duplicates and unused files to list.
    """
    facts = [("images", _images(sheet)), ("sizes", ", ".join(_size(size, count) for size, count in sheet.buckets))]
    facts += _captions(sheet, most)
    small = sorted((each for each in sheet.entries if each.enlarged > 1), key=lambda each: -each.enlarged)
    if small:
        names = _listed([f"{each.name} {each.enlarged:.1f} times" for each in small], most)
        facts.append(("enlarged", f"{counted(len(small), 'image')} smaller than the size: {names}"))
    facts += [("same file", " = ".join(names)) for names in sheet.duplicates[:most]]
    if len(sheet.duplicates) > most:
        facts.append(("", f"and {len(sheet.duplicates) - most} more groups"))
    facts += [("hint", hint) for hint in sheet.hints]
    facts += [("left out", str(each)) for each in sheet.faults]
    facts += [("not used", str(each)) for each in sheet.others[:most]]
    if len(sheet.others) > most:
        facts.append(("", f"and {len(sheet.others) - most} more unused files; --json lists them"))
    return "\n".join(
        f"{'' if number and facts[number - 1][0] == name else name:<12}{fact}"
        for number, (name, fact) in enumerate(facts)
    )


def _images(sheet: DataSheet) -> str:
    shown = sum(entry.repeats for entry in sheet.entries)
    views = sum(entry.views for entry in sheet.entries)
    line = f"{len(sheet.entries)} to train on, {len(sheet.faults)} left out"
    line += f", {shown} shown in an epoch" if shown != len(sheet.entries) else ""
    return line + (f", {views} views kept" if views != len(sheet.entries) else "")


def _captions(sheet: DataSheet, most: int) -> list[tuple[str, str]]:
    captions = sheet.captions
    if not captions:
        return []
    longest = max(captions, key=lambda caption: len(caption[0]))[0]
    facts = [("captions", f"{len(captions)} distinct, the longest of {len(longest)} characters")]
    facts += [("", f"{_quoted(text)} ({counted(count, 'image')})") for text, count in captions[:most]]
    facts += [("", f"and {len(captions) - most} more")] if len(captions) > most else []
    facts += _variants(sheet, most)
    facts += [
        ("too long", f"{tokens} tokens; the text encoder truncates the caption: {_quoted(text)}")
        for text, tokens in list(sheet.beyond_limit.items())[:most]
    ]
    return facts


def _variants(sheet: DataSheet, most: int) -> list[tuple[str, str]]:
    """Return the number of variants of captions, and those of one image as an example."""
    line = sheet.variants_line()
    if line is None:
        return []
    example = max(sheet.varied, key=lambda entry: len(entry.texts))
    facts = [("variants", line), ("", f"for example of {example.name}:")]
    facts += [("", _quoted(text)) for text in example.texts[:most]]
    return facts + ([("", f"and {len(example.texts) - most} more")] if len(example.texts) > most else [])


def _size(size: tuple[int, int], count: int) -> str:
    ratio = math.gcd(*size)
    return f"{size[0]} x {size[1]} ({size[0] // ratio}:{size[1] // ratio}): {count}"


def _quoted(text: str, length: int = 100) -> str:
    short = " ".join(text.split())
    return f'"{short if len(short) <= length else short[: length - 1] + "…"}"'


def _listed(names: list[str], most: int) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


class Thumbnails:
    """Collector of thumbnails of the training images.

    Args:
        unmasked_weight: minimum loss weight outside the mask; thumbnails fade masked-out areas by this factor.
    """

    def __init__(self, unmasked_weight: float) -> None:
        self._unmasked_weight = unmasked_weight
        self._kept: dict[tuple[int, int], list[tuple[Image.Image, str]]] = {}

    def watched(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Yield the samples unchanged and keep thumbnails of the first ones of each size."""
        for sample in samples:
            kept = self._kept.setdefault((sample.pixels.shape[2], sample.pixels.shape[1]), [])
            if not sample.further and len(kept) < _SHOWN:
                kept.append((self._thumbnail(sample), sample.caption))
            yield sample

    def sheet(self) -> Image.Image:
        """Return a contact sheet of the thumbnails by size, most frequent first.

        If there are more than fit, every size gets the same number of places.
        """
        sizes = sorted(self._kept, key=lambda size: -len(self._kept[size]))[:_SHOWN]
        most = _SHOWN // len(sizes)
        room = _SHOWN - sum(min(most, len(self._kept[size])) for size in sizes)
        images, captions = [], []
        for size in sizes:
            extra = min(room, max(0, len(self._kept[size]) - most))
            room -= extra
            for image, caption in self._kept[size][: most + extra]:
                images.append(image)
                captions.append((f"{size[0]} x {size[1]}", caption))
        return captioned_grid(images, captions, columns=_COLUMNS, cell=_CELL)

    def _thumbnail(self, sample: Sample) -> Image.Image:
        pixels = (sample.pixels.permute(1, 2, 0).numpy() + 1) * 127.5
        if sample.mask is not None:
            weights = np.maximum(sample.mask[0].numpy(), self._unmasked_weight)[..., None]
            # Fade to gray, which is rarer in images than black and white.
            pixels = pixels * weights + 128 * (1 - weights)
        image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
        image.thumbnail((_CELL, _CELL), Image.Resampling.LANCZOS)
        return image
