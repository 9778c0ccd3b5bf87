"""What the metrics of a run's checkpoints compare with: true images, the base's images and the training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...data.example import Example
from ...evaluation.comparison import Comparison, MetricNetworks, References, Row
from ...evaluation.metric_names import KID_IMAGES, METRICS
from ...evaluation.sampling import Sampling, as_bytes, generate, load_images
from ...pipelines.load_base import is_inpainting, sampling_pipeline
from ...utils.errors import TrainingError
from ..config.train_config import TrainConfig
from ..config.validation import logged_name
from ..losses.objective import scheduler_changes

_BATCH_SIZE = 4
"""Images generated in one batch; a small number, because training holds memory too."""


@dataclass(frozen=True)
class MetricInputs:
    """Captions, sampling settings and references of the metrics of a run.

    Attributes:
        captions: held-out captions, or the validation prompts if no image is held out.
        drift_prompts: prompts without the subject.
        sampling: settings of every image.
        comparison: metrics of a set of images; None if none can be measured.
        missing: metrics that cannot be measured, each with what it needs.
        held_out: whether the captions are those of held-out images.
    """

    captions: tuple[str, ...]
    drift_prompts: tuple[str, ...]
    sampling: Sampling
    comparison: Comparison | None
    missing: dict[str, str]
    held_out: bool

    def generate(self, pipeline: Any) -> Row:
        """Return the metrics of images that a pipeline generates with its tuners."""
        assert self.comparison is not None
        images = generate(pipeline, [*self.captions, *self.drift_prompts], self.sampling)
        count = len(self.captions)
        return self.comparison.row(images[:count], images[count:])

    def describe(self, names: Sequence[str]) -> list[str]:
        """Return the lines of the plan about these metrics."""
        images = f"{len(self.captions)} {'held-out captions' if self.held_out else 'validation prompts'}"
        measured = [name for name in names if name not in self.missing]
        lines = [f"{', '.join(measured)} on images of {images}, from the saved file"] if measured else []
        return lines + [f"{name} is not measured: it {reason}" for name, reason in self.missing.items()]


def prepare_metrics(
    config: TrainConfig, pipeline: Any, training: Sequence[Example], held_out: Sequence[Example]
) -> MetricInputs | None:
    """Generate the base's images and compute the features that the metrics of a run compare with.

    Args:
        config: settings of the run.
        pipeline: the base, without tuners.
        training: the training images.
        held_out: images that are held out of training.

    Raises:
        TrainingError: if the base does not support metrics, or the metric that decides about the best tuner cannot be
            measured.
        RestuneError: if the extra `evaluate` is not installed.
    """
    validation = config.validation
    names = [name for name in METRICS if logged_name(name) in validation.metrics]
    if not names:
        return None
    if is_inpainting(pipeline):
        raise TrainingError("An inpainting base cannot generate images from a prompt alone; omit --validation.metrics.")
    networks = MetricNetworks(pipeline.device, names)
    samples = load_images(pipeline, held_out[: validation.metric_images])
    captions = tuple(sample.caption for sample in samples) or validation.prompts
    seen = load_images(pipeline, training) if "nearest_training" in names else []
    drift_prompts = config.drift_prompts if "drift" in names else ()
    sampling = Sampling(validation.steps, validation.guidance, validation.seed, _BATCH_SIZE)
    sampler = sampling_pipeline(pipeline, scheduler_changes(config.loss.prediction_type))
    base = generate(sampler, [*captions, *drift_prompts], sampling)
    references = References(
        base[: len(captions)], [as_bytes(each) for each in samples], [as_bytes(each) for each in seen],
        base[len(captions) :],
    )  # fmt: skip
    few = 0 < len(samples) < KID_IMAGES
    comparison = Comparison(networks, references, [name for name in names if not (few and name == "kid")])
    missing = {logged_name(name): reason for name, reason in comparison.missing.items()}
    if few and "kid" in names:
        missing["kid"] = f"needs {KID_IMAGES} held-out images to be more than noise, and there are {len(samples)}"
    wanted, checkpoints = config.checkpoints.best_by, config.checkpoints
    if wanted in missing and (checkpoints.keep is not None or checkpoints.patience is not None):
        raise TrainingError(
            f"The best tuner cannot be chosen by {wanted}: it {missing[wanted]}; choose another --best-by, or hold out "
            "more images."
        )
    return MetricInputs(captions, drift_prompts, sampling, comparison, missing, bool(samples))
