"""Distillation loss: squared error between the predictions of the student and of the teacher.

For noisy latents `x_t` of a batch, with the frozen base `f`:

    loss = w * |f_student(x_t, t, c) - f_teacher(x_t, t, c)|^2 + (1 - w) * |f_student(x_t, t, c) - target|^2

`w` is `teacher_loss_weight`. Both predictions are of the base's type (epsilon, v or sample).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ...utils.errors import TrainingError
from ..latents.batches import Batch
from ..losses.prediction import predict, tuners_disabled
from ..state import TrainState

_PROBED = 8


def teacher_prediction(run: TrainState, batch: Batch) -> torch.Tensor | None:
    """Return the teacher's prediction for a batch, without gradients; None for a run without a teacher.

    Call it before the student's prediction: gradient checkpointing runs the base again in the backward pass, with the
    tuners that are active then.
    """
    if run.teacher is None:
        return None
    with run.teacher.acting(run.pipeline.unet):
        return predict(run, _as_taught(batch))


def sample_losses(
    run: TrainState, batch: Batch, prediction: torch.Tensor, taught: torch.Tensor | None
) -> torch.Tensor:
    """Return the loss of each sample, `(samples,)` in fp32, against the teacher, the data, or a mix of both."""
    objective = run.objective

    def against(target: torch.Tensor) -> torch.Tensor:
        return objective.sample_losses(prediction, target, batch.timesteps, batch.mask)

    share = 0.0 if run.teacher is None else run.teacher.record.loss_weight
    if taught is not None and share == 1:
        return against(taught)
    data = against(objective.target(batch.latents, batch.noise, batch.timesteps))
    # A run without a teacher has nothing to weight.
    return data if taught is None else share * against(taught) + (1 - share) * data


@torch.no_grad()
def check_effect(run: TrainState) -> None:
    """Raise `TrainingError` if the teacher does not change the base's predictions for the first batches."""
    if run.teacher is None:
        return
    # Several batches, because a teacher on the text encoders may change nothing for dropped captions.
    for number in range(_PROBED):
        batch = run.batches[number]
        taught = teacher_prediction(run, batch)
        assert taught is not None
        with tuners_disabled(run.pipeline.unet):
            base = predict(run, replace(batch, features=None))
        if not torch.equal(taught, base):
            return
    raise TrainingError(
        f"The teacher {run.teacher.record.file} does not change the base's predictions, so there is nothing to learn "
        f"from it; give a trained tuner for this base."
    )


def _as_taught(batch: Batch) -> Batch:
    """Return the batch with the teacher's text embeddings; the teacher runs the whole base."""
    return replace(batch, inputs=batch.teacher_inputs or batch.inputs, features=None)
