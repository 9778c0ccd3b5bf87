"""Draw held-out captions with and without a tuner, and measure both against the true pictures."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..data.captions import find_examples
from ..data.training_images import Sample, load_samples
from ..hooks.manager import TunerManager
from ..pipelines.load_base import training_resolution
from ..storage.tuner_file import read_info
from ..utils.errors import DataError, RestuneError
from .features import InceptionFeatures
from .lpips import Lpips
from .metrics import kernel_distance, nearest_distance, retrieval_accuracy, similarity, style_share
from .packaged import require_package
from .report import Evaluation, Row, write_report

logger = logging.getLogger(__name__)

_BATCH_OF_METRICS = 16


@dataclass(frozen=True)
class _Drawing:
    """How every image is drawn."""

    steps: int
    guidance: float
    seed: int
    batch_size: int


def evaluate_tuner(
    pipeline: Any,
    tuner: str | Path,
    data: Path,
    output: Path,
    *,
    weight: float = 1.0,
    training_images: Path | None = None,
    drift_prompts: Sequence[str] = (),
    steps: int = 20,
    guidance: float = 4.0,
    seed: int = 0,
    limit: int | None = None,
    batch_size: int = 16,
) -> Evaluation:
    """Measure a tuner on pictures of its style, and write report.json, report.md and grid.png.

    Each caption is drawn by the base alone and with the tuner, from the same noise. Both sets are compared with the
    true pictures, scaled and cropped to the base's own size.

    Args:
        pipeline: a base that takes tuners, with none loaded.
        tuner: the tuner's file.
        data: pictures of the style with captions, as for training, but not the training's own.
        output: folder for the report; made where it does not exist.
        weight: weight of the tuner.
        training_images: the training's pictures, to see whether the tuner repeats them; captions are not needed.
        drift_prompts: prompts without the style, to see what the tuner changes where it should not.
        steps, guidance: denoising steps and classifier-free guidance.
        seed: seed of the first image; the others count on from there.
        limit: use only so many pictures, the first ones.
        batch_size: images that are drawn at once.

    Raises:
        DataError: if there are fewer than two pictures, or captions are missing.
        TunerFileError: if the tuner's file is missing, damaged or foreign, or the report cannot be written.
        RestuneError: if the tuner does not fit, the pipeline has tuners, or the extra `evaluate` is not installed.
    """
    manager = TunerManager.of(pipeline.unet)
    if manager is not None:
        raise RestuneError(f"Take the tuners {', '.join(manager.names)} off the base before evaluating one.")
    # Whatever can be wrong is found before the drawing, which may take hours.
    read_info(tuner)
    samples = _read(data, pipeline, limit)
    # Nothing is drawn for the training's pictures, so any caption will do.
    training = [] if training_images is None else _read(training_images, pipeline, None, prompt="any")
    _warn_of_shared_pictures(samples, training)
    measure = _Measure(pipeline.device)
    drawing = _Drawing(steps, guidance, seed, batch_size)
    captions = [sample.caption for sample in samples]
    pipeline.load_tuner_weights(tuner, weight=weight)
    try:
        tuned = _draw(pipeline, [*captions, *drift_prompts], drawing, "with the tuner")
    finally:
        pipeline.unload_tuner_weights()
    plain = _draw(pipeline, [*captions, *drift_prompts], drawing, "the base alone")
    count = len(captions)
    pictures = {
        "true pictures": [_as_bytes(sample) for sample in samples],
        "base": plain[:count],
        "tuner": tuned[:count],
    }
    rows = measure.rows(pictures, [_as_bytes(sample) for sample in training])
    if drift_prompts:
        rows["tuner"]["drift"] = float(measure.distances(tuned[count:], plain[count:]).mean())
    evaluation = Evaluation(
        rows=rows,
        settings={
            "base": Path(pipeline.name_or_path).name,
            "tuner": Path(tuner).name,
            "tuner_sha256": _digest(tuner),
            "weight": weight,
            "pictures": count,
            "training_pictures": len(training),
            "drift_prompts": list(drift_prompts),
            "steps": steps,
            "guidance": guidance,
            "seed": seed,
            "resolution": samples[0].pixels.shape[-1],
        },
    )
    write_report(evaluation, output, captions, [pictures[name] for name in ("true pictures", "base", "tuner")])
    return evaluation


class _Measure:
    """The networks that turn pictures, held as N x 3 x H x W bytes, into numbers."""

    def __init__(self, device: torch.device) -> None:
        require_package("torchmetrics")
        self.device = device
        self.inception = InceptionFeatures(_BATCH_OF_METRICS).to(device)
        self.lpips = Lpips().to(device)

    def rows(self, pictures: dict[str, list[torch.Tensor]], training: list[torch.Tensor]) -> dict[str, Row]:
        """Return what is measured of the base's, the tuner's and the true pictures."""
        features = {name: self.features(images) for name, images in pictures.items()}
        seen = self.features(training) if training else None
        true = features["true pictures"]
        rows: dict[str, Row] = {}
        for name in ("base", "tuner", "true pictures"):
            found = features[name]
            row: Row = {
                "kid": kernel_distance(found, true)[0],
                "style_share": style_share(found, true, features["base"]),
                "retrieval_top1": retrieval_accuracy(found, true, 1),
                # Among five pictures or fewer, each is among the five most similar ones.
                "retrieval_top5": retrieval_accuracy(found, true, 5) if len(true) > 5 else None,
                "lpips": float(self.distances(pictures[name], pictures["true pictures"]).mean()),
                "similarity": float(similarity(found, true).mean()),
                "nearest_training": None if seen is None else float(nearest_distance(found, seen).mean()),
                "drift": None,
            }
            rows[name] = row
        # Against themselves the true pictures would come out perfect; one half against the other is a fair aim.
        halves = true[::2], true[1::2]
        rows["true pictures"]["kid"] = kernel_distance(*halves)[0] if len(halves[1]) > 1 else None
        for key in ("retrieval_top1", "retrieval_top5", "lpips", "similarity"):
            rows["true pictures"][key] = None
        return rows

    def features(self, pictures: list[torch.Tensor]) -> torch.Tensor:
        return self._in_batches(self.inception, pictures)

    @torch.no_grad()
    def distances(self, a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
        return self._in_batches(self.lpips, a, b)

    def _in_batches(self, function: Callable[..., torch.Tensor], *sets: list[torch.Tensor]) -> torch.Tensor:
        results = []
        for start in range(0, len(sets[0]), _BATCH_OF_METRICS):
            batches = [torch.stack(pictures[start : start + _BATCH_OF_METRICS]) for pictures in sets]
            results.append(function(*(batch.to(self.device).float() / 255 for batch in batches)).cpu())
        return torch.cat(results)


def _read(folder: Path, pipeline: Any, limit: int | None, prompt: str | None = None) -> list[Sample]:
    resolution = training_resolution(pipeline, None)
    samples = list(load_samples(find_examples(folder, prompt)[:limit], resolution))
    if len(samples) < 2:
        raise DataError(f"An evaluation needs at least two pictures, and {len(samples)} can be used in {folder}.")
    return samples


def _warn_of_shared_pictures(samples: list[Sample], training: list[Sample]) -> None:
    shared = len({sample.digest for sample in samples} & {sample.digest for sample in training})
    if shared:
        logger.warning("%d of the pictures are also training pictures; the figures flatter the tuner.", shared)


def _draw(pipeline: Any, prompts: list[str], drawing: _Drawing, what: str) -> list[torch.Tensor]:
    images: list[Image.Image] = []
    for start in tqdm(range(0, len(prompts), drawing.batch_size), desc=f"Drawing, {what}", disable=None):
        batch = prompts[start : start + drawing.batch_size]
        images += pipeline(
            batch,
            num_inference_steps=drawing.steps,
            guidance_scale=drawing.guidance,
            # One for each image and on the CPU, so that the batch size and the machine do not change the noise.
            generator=[torch.Generator("cpu").manual_seed(drawing.seed + start + i) for i in range(len(batch))],
        ).images
    return [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images]


def _as_bytes(sample: Sample) -> torch.Tensor:
    return ((sample.pixels + 1) * 127.5).round().to(torch.uint8)


def _digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
