"""What the metrics of a run's checkpoints compare with: true images, the base's images and the training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from ...data.example import Example
from ...evaluation.comparison import Comparison, MetricNetworks, References, Row
from ...evaluation.metric_names import KID_IMAGES, METRICS, MetricName, without_reference
from ...evaluation.sampling import Sampling, as_bytes, generate, load_images
from ...pipelines.load_base import is_inpainting, sampling_pipeline
from ...utils.errors import TrainingError
from ..config.train_config import TrainConfig
from ..config.validation import logged_name
from ..losses.objective import scheduler_changes
from .held_out import HeldOut

_BATCH_SIZE = 4
"""Images generated in one batch; a small number, because training holds memory too."""


@dataclass(frozen=True)
class MetricInputs:
    """Captions, sampling settings and references of the metrics of a run.

    Attributes:
        names: metrics that are measured.
        missing: metrics that cannot be measured, each with what it needs.
        captions: held-out captions, or the validation prompts if no image is held out.
        drift_prompts: prompts without the subject.
        sampling: settings of every image.
        comparison: metrics of a set of images; None if none can be measured, and in processes that do not measure.
    """

    names: tuple[MetricName, ...]
    missing: dict[MetricName, str]
    captions: tuple[str, ...]
    drift_prompts: tuple[str, ...]
    sampling: Sampling
    comparison: Comparison | None

    def measure(self, pipeline: Any) -> Row:
        """Return the metrics of images that a pipeline generates with its tuners."""
        assert self.comparison is not None
        count = len(self.captions)
        images = generate(pipeline, [*self.captions, *self.drift_prompts], self.sampling)
        return self.comparison.row(images[:count], images[count:])

    def describe(self) -> list[str]:
        """Return lines for the plan: the metrics, and those that cannot be measured with the reason."""
        lines = []
        if self.names:
            names = ", ".join(map(logged_name, self.names))
            lines.append(f"{names}, of images of {len(self.captions)} captions by the saved file")
        return lines + [f"no {logged_name(name)}, which {reason}" for name, reason in self.missing.items()]


def prepare_metrics(
    config: TrainConfig,
    accelerator: Accelerator,
    pipeline: Any,
    training: Sequence[Example],
    held_out: HeldOut | None,
) -> MetricInputs | None:
    """Generate the base's images and compute the features that the metrics of a run compare with.

    Args:
        config: settings of the run.
        accelerator: process of the run; the main process alone measures.
        pipeline: the base, without tuners.
        training: the training images.
        held_out: images that are held out of training.

    Raises:
        TrainingError: if the base does not support metrics, or the metric that decides about the best tuner cannot be
            measured.
        RestuneError: if the extra `evaluate` is not installed.
    """
    validation = config.validation
    wanted = [name for name in METRICS if logged_name(name) in validation.metrics]
    if not wanted:
        return None
    if is_inpainting(pipeline):
        raise TrainingError(
            "An inpainting base cannot generate images from a prompt alone; omit --validation.metrics."
        )
    examples = held_out.examples[: validation.metric_images] if held_out is not None else ()
    drift_prompts = config.drift_prompts if "drift" in wanted else ()
    missing = without_reference(wanted, true=len(examples), training=len(training), drift=len(drift_prompts))
    if "kid" in wanted and len(examples) < KID_IMAGES:
        missing["kid"] = f"needs {KID_IMAGES} held-out images to be more than noise, and there are {len(examples)}"
    _check_best(config, missing)
    names = tuple(name for name in wanted if name not in missing)
    networks = MetricNetworks(pipeline.device, names)
    captions = tuple(example.caption for example in examples) or validation.prompts
    sampling = Sampling(validation.steps, validation.guidance, validation.seed, _BATCH_SIZE)
    comparison = None
    if names and accelerator.is_main_process:
        sampler = sampling_pipeline(pipeline, scheduler_changes(config.loss.prediction_type))
        base = generate(sampler, [*captions, *drift_prompts], sampling)
        true = [as_bytes(each) for each in load_images(pipeline, examples)]
        seen = load_images(pipeline, training) if "nearest_training" in names else []
        count = len(captions)
        references = References(base[:count], true, [as_bytes(each) for each in seen], base[count:])
        comparison = Comparison(networks, references, names)
    return MetricInputs(names, missing, captions, drift_prompts, sampling, comparison)


def _check_best(config: TrainConfig, missing: dict[MetricName, str]) -> None:
    checkpoints = config.checkpoints
    if checkpoints.keep is None and checkpoints.patience is None:
        return
    for name, reason in missing.items():
        if logged_name(name) == checkpoints.best_by:
            raise TrainingError(
                f"The best tuner cannot be chosen by {checkpoints.best_by}, which {reason}; choose another "
                f"--best-by, or change --validation.holdout."
            )
