"""One forward pass of the base for several bypass tuners that train on the same batches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from ..latents.batches import Batch, BatchSource
from ..state import TrainState
from .tap_features import TapFeatures, record_features


def tapped_by(runs: Sequence[TrainState]) -> set[str]:
    """Return the sites that the tuners of the runs read."""
    return {site for run in runs for part in run.tuner.parts() for site in part.taps}


def features_of(run: TrainState, taps: Collection[str], batch: Batch) -> TapFeatures:
    """Run the base without tuners on a batch, in the run's precision, and return the features that a bypass reads."""
    unet = run.pipeline.unet
    noisy = run.objective.add_noise(batch.latents, batch.input_noise, batch.timesteps)
    with run.base_precision():
        sample = batch.denoiser_sample(noisy).to(unet.dtype)
        return record_features(unet, taps, sample, batch.timesteps, return_dict=False, **batch.inputs)


class SharedPassBatches:
    """Batches with the features of the base's forward pass; the last ones are kept for the other runs.

    Args:
        batches: batches without features.
        compute: computes the features of a batch.
        kept: number of batches kept.
    """

    def __init__(self, batches: BatchSource, compute: Callable[[Batch], TapFeatures], kept: int) -> None:
        self._batches, self._compute, self._kept = batches, compute, kept
        self._ready: dict[int, Batch] = {}

    def __getitem__(self, number: int) -> Batch:
        if number not in self._ready:
            batch = self._batches[number]
            self._ready[number] = replace(batch, features=self._compute(batch))
            while len(self._ready) > self._kept:
                del self._ready[next(iter(self._ready))]
        return self._ready[number]


def share_passes(runs: Sequence[TrainState]) -> None:
    """Make bypass runs with the same batches share one forward pass of the base per batch.

    The tuners must not be attached. Each tuner has its own forward pass through the output head, with the batch size
    that it has when it is trained alone, so that both results are equal to the last bit.
    """
    run, taps = runs[0], tapped_by(runs)
    kept = run.config.gradient_accumulation_steps
    shared = SharedPassBatches(run.batches, lambda batch: features_of(run, taps, batch), kept)
    for each in runs:
        each.batches = shared
