"""Generate images for held-out captions with and without a tuner, and compare both sets with the true images."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.training_images import Sample
from ..hooks.manager import TunerManager
from ..storage.base_files.location import public_name
from ..storage.tuner_file import read_info
from ..utils.errors import RestuneError
from .comparison import Comparison, MetricNetworks, References
from .report import Evaluation, write_report
from .sampling import Sampling, as_bytes, generate, read_images

logger = logging.getLogger(__name__)


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
    samples = read_images(pipeline, data, limit)
    # No image is generated from the captions of the training images, so a constant one is enough.
    training = [] if training_images is None else read_images(pipeline, training_images, prompt="any")
    warn_of_shared_images(samples, training)
    networks = MetricNetworks(pipeline.device)
    sampling = Sampling(steps, guidance, seed, batch_size)
    captions = [sample.caption for sample in samples]
    prompts, count = [*captions, *drift_prompts], len(captions)
    pipeline.load_tuner_weights(tuner, weight=weight)
    try:
        tuned = generate(pipeline, prompts, sampling, "base and tuner")
    finally:
        pipeline.unload_tuner_weights()
    plain = generate(pipeline, prompts, sampling, "base")
    true = [as_bytes(sample) for sample in samples]
    references = References(plain[:count], true, [as_bytes(sample) for sample in training], plain[count:])
    comparison = Comparison(networks, references)
    rows = {
        "base": comparison.base_row(),
        "tuner": comparison.row(tuned[:count], tuned[count:]),
        "true pictures": comparison.true_row(),
    }
    evaluation = Evaluation(
        rows=rows,
        settings={
            "base": Path(pipeline.name_or_path).name,
            **({"vae": public_name(vae)} if vae is not None else {}),
            "tuner": Path(tuner).name,
            "tuner_sha256": digest(tuner),
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
    write_report(evaluation, output, captions, [true, plain[:count], tuned[:count]])
    return evaluation


def warn_of_shared_images(samples: list[Sample], training: list[Sample]) -> None:
    """Log a warning if true images are also training images."""
    shared = len({sample.digest for sample in samples} & {sample.digest for sample in training})
    if shared:
        logger.warning("%d of the images are also training images; this biases the metrics in its favor.", shared)


def digest(path: str | Path) -> str:
    """Return the SHA-256 of a file in hex."""
    return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
