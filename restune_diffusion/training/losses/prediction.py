"""Predictions of the denoiser for a training batch, with the tuner or with tuners disabled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...hooks.attachment import attach
from ...hooks.manager import TunerManager
from ..feature_cache.tap_features import predict_from_features
from ..latents.batches import Batch
from ..state import ATTACHED_NAME, TrainState


def predict(run: TrainState, batch: Batch) -> torch.Tensor:
    """Return the prediction for a batch's noisy latents, in the run's precision and the shape of the latents."""
    unet = run.pipeline.unet
    if batch.features is not None:
        # The head must not add the residual again.
        with run.base_precision(), tuners_paused(unet):
            return predict_from_features(unet, run.tuner, batch.features)
    noisy = run.objective.add_noise(batch.latents, batch.input_noise, batch.timesteps)
    manager = TunerManager.of(unet)
    if manager is not None and batch.conditions:
        manager.set_conditions(ATTACHED_NAME, batch.conditions)
    with run.base_precision():
        sample = batch.denoiser_sample(noisy).to(unet.dtype)
        prediction: torch.Tensor = unet(sample, batch.timesteps, return_dict=False, **batch.inputs)[0]
    return prediction


@contextmanager
def tuner_attached(run: TrainState) -> Iterator[None]:
    """Context manager that attaches a run's tuner to the base, unless it is attached already."""
    manager = TunerManager.of(run.pipeline.unet)
    if manager is not None and ATTACHED_NAME in manager.names:
        yield
        return
    with attach(run.pipeline.unet, run.tuner, ATTACHED_NAME):
        yield


@contextmanager
def tuners_disabled(unet: Any) -> Iterator[None]:
    """Context manager that disables all tuners on the base, and gradients."""
    with tuners_paused(unet), torch.no_grad():
        yield


@contextmanager
def tuners_paused(unet: Any) -> Iterator[None]:
    """Context manager that disables all tuners on the base."""
    manager = TunerManager.of(unet)
    before = manager.enabled if manager is not None else True
    if manager is not None:
        manager.enabled = False
    try:
        yield
    finally:
        if manager is not None:
            manager.enabled = before
