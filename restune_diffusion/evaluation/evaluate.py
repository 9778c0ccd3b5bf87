"""Generate images for held-out captions with and without a tuner, and compare both sets with the true images."""

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
from ..storage.base_files.location import public_name
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
class _Sampling:
    """Sampling settings of every image."""

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
    vae: str | None = None,
) -> Evaluation:
    """Evaluate a tuner on held-out images of its style, and write report.json, report.md and grid.png.

    An image is generated for each caption by the base and by the base with the tuner, from the same noise. Both sets
    are compared with the true images, which are scaled and cropped to the base's native size.

    Args:
        pipeline: pipeline that supports tuners, with none loaded.
        tuner: file of the tuner.
        data: folder of captioned images of the style, in the format of a training folder, without training images.
        output: folder for the report; created if it does not exist.
        weight: weight of the tuner.
        training_images: folder of the training images, to detect memorization; captions are not needed.
        drift_prompts: prompts without the style, to measure unwanted changes.
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        seed: seed of the first image; image i uses seed + i.
        limit: maximum number of images; the first ones are used.
        batch_size: number of images generated in one batch.
        vae: VAE with which the pipeline was loaded instead of the base's own, for the report.

    Returns:
        The measured numbers and the settings.

    Raises:
        DataError: if there are fewer than two images, or captions are missing.
        TunerFileError: if the tuner's file is missing, damaged or of another program, or the report cannot be written.
        RestuneError: if the tuner does not fit, the pipeline has tuners, or the extra `evaluate` is not installed.
    """
    manager = TunerManager.of(pipeline.unet)
    if manager is not None:
        raise RestuneError(
            f"The pipeline has the tuners {', '.join(manager.names)} loaded; unload them before the evaluation."
        )
    # All inputs are checked before sampling, which may take hours.
    read_info(tuner)
    samples = _read(data, pipeline, limit)
    # No image is generated from the captions of the training images, so a constant one is enough.
    training = [] if training_images is None else _read(training_images, pipeline, None, prompt="any")
    _warn_of_shared_images(samples, training)
    measure = _Measure(pipeline.device)
    sampling = _Sampling(steps, guidance, seed, batch_size)
    captions = [sample.caption for sample in samples]
    pipeline.load_tuner_weights(tuner, weight=weight)
    try:
        tuned = _generate(pipeline, [*captions, *drift_prompts], sampling, "base and tuner")
    finally:
        pipeline.unload_tuner_weights()
    plain = _generate(pipeline, [*captions, *drift_prompts], sampling, "base")
    count = len(captions)
    images = {
        "true pictures": [_as_bytes(sample) for sample in samples],
        "base": plain[:count],
        "tuner": tuned[:count],
    }
    rows = measure.rows(images, [_as_bytes(sample) for sample in training])
    if drift_prompts:
        rows["tuner"]["drift"] = float(measure.distances(tuned[count:], plain[count:]).mean())
    evaluation = Evaluation(
        rows=rows,
        settings={
            "base": Path(pipeline.name_or_path).name,
            **({"vae": public_name(vae)} if vae is not None else {}),
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
    write_report(evaluation, output, captions, [images[name] for name in ("true pictures", "base", "tuner")])
    return evaluation


class _Measure:
    """Metrics of sets of images, each image 3 x H x W in uint8."""

    def __init__(self, device: torch.device) -> None:
        require_package("torchmetrics")
        self.device = device
        self.inception = InceptionFeatures(_BATCH_OF_METRICS).to(device)
        self.lpips = Lpips().to(device)

    def rows(self, images: dict[str, list[torch.Tensor]], training: list[torch.Tensor]) -> dict[str, Row]:
        """Return the metrics of the base's, the tuner's and the true images."""
        features = {name: self.features(each) for name, each in images.items()}
        seen = self.features(training) if training else None
        true = features["true pictures"]
        rows: dict[str, Row] = {}
        for name in ("base", "tuner", "true pictures"):
            found = features[name]
            row: Row = {
                "kid": kernel_distance(found, true)[0],
                "style_share": style_share(found, true, features["base"]),
                "retrieval_top1": retrieval_accuracy(found, true, 1),
                # With five images or fewer, every image is among the five most similar ones.
                "retrieval_top5": retrieval_accuracy(found, true, 5) if len(true) > 5 else None,
                "lpips": float(self.distances(images[name], images["true pictures"]).mean()),
                "similarity": float(similarity(found, true).mean()),
                "nearest_training": None if seen is None else float(nearest_distance(found, seen).mean()),
                "drift": None,
            }
            rows[name] = row
        # The true images would match themselves perfectly; one half against the other is a realistic target.
        halves = true[::2], true[1::2]
        rows["true pictures"]["kid"] = kernel_distance(*halves)[0] if len(halves[1]) > 1 else None
        for key in ("retrieval_top1", "retrieval_top5", "lpips", "similarity"):
            rows["true pictures"][key] = None
        return rows

    def features(self, images: list[torch.Tensor]) -> torch.Tensor:
        return self._in_batches(self.inception, images)

    @torch.no_grad()
    def distances(self, a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
        return self._in_batches(self.lpips, a, b)

    def _in_batches(self, function: Callable[..., torch.Tensor], *sets: list[torch.Tensor]) -> torch.Tensor:
        results = []
        for start in range(0, len(sets[0]), _BATCH_OF_METRICS):
            batches = [torch.stack(images[start : start + _BATCH_OF_METRICS]) for images in sets]
            results.append(function(*(batch.to(self.device).float() / 255 for batch in batches)).cpu())
        return torch.cat(results)


def _read(folder: Path, pipeline: Any, limit: int | None, prompt: str | None = None) -> list[Sample]:
    resolution = training_resolution(pipeline, None)
    samples = list(load_samples(find_examples(folder, prompt)[:limit], resolution))
    if len(samples) < 2:
        raise DataError(f"An evaluation needs at least two images, but {folder} has {len(samples)}.")
    return samples


def _warn_of_shared_images(samples: list[Sample], training: list[Sample]) -> None:
    shared = len({sample.digest for sample in samples} & {sample.digest for sample in training})
    if shared:
        logger.warning("%d of the images are also training images; this biases the metrics in its favor.", shared)


def _generate(pipeline: Any, prompts: list[str], sampling: _Sampling, what: str) -> list[torch.Tensor]:
    images: list[Image.Image] = []
    for start in tqdm(range(0, len(prompts), sampling.batch_size), desc=f"Generating, {what}", disable=None):
        batch = prompts[start : start + sampling.batch_size]
        images += pipeline(
            batch,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            # One CPU generator per image, so that the noise depends on neither batch size nor device.
            generator=[torch.Generator("cpu").manual_seed(sampling.seed + start + i) for i in range(len(batch))],
        ).images
    return [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images]


def _as_bytes(sample: Sample) -> torch.Tensor:
    return ((sample.pixels + 1) * 127.5).round().to(torch.uint8)


def _digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
