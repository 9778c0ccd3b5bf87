"""Validation settings: sample images and drift during training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import model_validator

from ...evaluation.metric_names import METRICS
from ...utils.setting_groups import setting
from ...utils.settings import Settings
from ..validation.measurements import VALIDATION_LOSS
from .renamed import renamed

CheckpointMetric: TypeAlias = Literal[
    "kid", "style_share", "retrieval_top1", "retrieval_top5", "lpips", "similarity", "nearest_training", "image_drift"
]
"""Name of a metric that training can measure, under which it is logged."""

_HOLDOUT = "a fraction between 0 and 1, a whole number of images, or a folder"


class ValidationConfig(Settings):
    """Sample images, generated during training, and measurement of the drift from the base."""

    prompts: tuple[str, ...] = setting((), affects="output")
    """Prompts of the sample images; without prompts, no samples are generated."""
    every: int = setting(0, affects="output", ge=0)
    """Generate samples every N steps, in addition to the start and the end; 0 generates them only then."""
    steps: int = setting(25, affects="output", gt=0)
    """Denoising steps of each sample."""
    guidance: float = setting(7.5, affects="output", ge=0)
    """Classifier-free guidance scale of the samples."""
    seed: int = setting(0, affects="output")
    """Seed of every sample. It is the same throughout training, so that samples of two steps are comparable."""
    # Recorded under their old name, which existing tuner files use.
    drift_prompts: tuple[str, ...] | None = setting(None, affects="output", recorded="leak_prompts")
    """Prompts without the subject. The drift from the base for these prompts is logged as `drift`, in percent. If not
    set, --class-prompt."""
    control_images: tuple[Path, ...] = setting((), affects="output", recorded=False)
    """Control images for the samples of a `control` tuner: one per prompt and condition. As in training, these are
    condition images, or images to compute the condition from if it is computed."""

    holdout: int | float | Path | None = setting(None, affects="output", recorded=False, expected=_HOLDOUT)
    """Images to hold out of training, for the validation loss: a fraction of them (0.1), a number of them (8), or a
    folder of other images, which is read by the same rules as --data."""
    holdout_seed: int = setting(0, affects="output", recorded=False)
    """Seed of the choice of the held-out images. The choice depends on it and on the content of the images alone."""
    loss_every: int | None = setting(None, affects="output", recorded=False, gt=0)
    """Measure the validation loss every N steps, in addition to the start and the end. If not set, with the samples of
    `every`; if that is 0 too, 20 times in the run."""
    metrics: tuple[CheckpointMetric, ...] = setting((), affects="output", recorded=False)
    """Metrics of `restune evaluate` to measure every `every` steps, at the start and at the end, on images that the
    saved file generates for the held-out captions, or for `prompts` without held-out images: lpips, style_share,
    retrieval_top1, retrieval_top5, similarity and kid compare with the held-out images, nearest_training with the
    training images, image_drift with the base's images of the drift prompts."""
    metric_images: int | None = setting(None, affects="output", recorded=False, gt=0)
    """Maximum number of held-out images that the metrics use; the first ones are used."""

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of the measurements of a run."""
        compared = {logged_name(name) for name, metric in METRICS.items() if metric.true_images}
        metrics = [name for name in self.metrics if self.holdout is not None or name not in compared]
        return (*(() if self.holdout is None else (VALIDATION_LOSS,)), *metrics)

    def due(self, step: int) -> bool:
        """Return whether a step is a multiple of `every`."""
        return self.every > 0 and step % self.every == 0

    def check_metrics(self) -> None:
        """Raise `ValueError` if there is nothing to measure the metrics on; `TrainConfig` calls it."""
        if self.metrics and self.holdout is None and not self.prompts:
            raise ValueError(
                "validation.metrics need captions to generate; set validation.holdout, or give validation.prompts"
            )
        if self.metric_images is not None and not self.metrics:
            raise ValueError(
                "validation.metric_images limits the images of validation.metrics, which are not set; omit it"
            )

    def check_holdout(self) -> None:
        """Raise `ValueError` if the settings of the held-out images are not valid.

        `TrainConfig` calls it: tyro would show an error of this class in a box.
        """
        holdout = self.holdout
        fits = 0 < holdout < 1 if isinstance(holdout, float) else not isinstance(holdout, int) or holdout >= 1
        if not fits:
            raise ValueError(f"validation.holdout = {holdout} is not valid; use {_HOLDOUT}")
        if self.loss_every is not None and holdout is None:
            raise ValueError(
                "validation.loss_every is for held-out images, but none are held out; set validation.holdout"
            )

    @model_validator(mode="before")
    @classmethod
    def _new_names(cls, values: Any) -> Any:
        return renamed(values, within="validation.").values if isinstance(values, dict) else values


def logged_name(metric: str) -> str:
    """Return the name under which training logs a metric of an evaluation; `drift` is that of the predictions."""
    return "image_drift" if metric == "drift" else metric
