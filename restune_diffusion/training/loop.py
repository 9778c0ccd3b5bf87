"""The training loop: forward, backward, optimizer step, and nothing else."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Sequence

import torch

from ..utils.errors import TrainingError, TrainingInterrupted
from .callbacks.base import Callback
from .latents.batches import Batch
from .losses.prediction import predict
from .optimization.optimizers import effective_learning_rate
from .output_folder import latest_checkpoint
from .processes import average_gradients
from .state import StepReport, TrainState
from .stopping import StopRequest

# fp16 loss scaling skips some steps while it searches for a scale; more in a row mean that training has diverged.
_MAX_SKIPPED_STEPS = 50


def run_loop(run: TrainState, callbacks: Sequence[Callback], stop: StopRequest | None = None) -> None:
    """Train until the run's last step and run the callbacks; see `steps_of`."""
    for _ in steps_of(run, callbacks, stop):
        pass


def steps_of(
    run: TrainState, callbacks: Sequence[Callback], stop: StopRequest | None = None
) -> Generator[int, None, None]:
    """Train until the run's last step, run the callbacks, and yield the number of each finished step.

    Raises:
        TrainingError: if the loss or the gradient is not finite; the tuner keeps its last finite state.
        TrainingInterrupted: if a stop is requested before the last step; the current step is finished first.
    """
    skipped = 0
    try:
        for callback in callbacks:
            callback.on_start(run)
        while run.step < run.steps:
            if stop is not None and stop.agreed(run.accelerator):
                raise _interrupted(run, callbacks, stop)
            report = _step(run)
            skipped = skipped + 1 if run.optimizer.step_was_skipped else 0
            if skipped > _MAX_SKIPPED_STEPS:
                raise _diverged(run, "gradient")
            for callback in callbacks:
                callback.on_step(run, report)
            yield run.step
        for callback in callbacks:
            callback.on_end(run)
    finally:
        for callback in callbacks:
            callback.close()


def _interrupted(run: TrainState, callbacks: Sequence[Callback], stop: StopRequest) -> TrainingInterrupted:
    for callback in callbacks:
        callback.on_stop(run)
    saved = latest_checkpoint(run.config.output)
    return TrainingInterrupted(
        f"Stopped after step {run.step} of {run.steps}, as requested; {saved} is saved. "
        f"Run the same command with --resume to continue from it.",
        by_ctrl_c=stop.by_ctrl_c,
    )


def _step(run: TrainState) -> StepReport:
    """Do one optimizer step."""
    started = time.perf_counter()
    config, accelerator = run.config, run.accelerator
    losses, kept = [], []
    for micro_step in range(config.gradient_accumulation_steps):
        number = run.step * config.gradient_accumulation_steps + micro_step
        number = number * accelerator.num_processes + accelerator.process_index
        batch = run.batches[number]
        with accelerator.accumulate():
            loss = batch_loss(run, batch)
            # Every process checks the mean over all processes, so that all of them stop at the same step.
            losses.append(accelerator.reduce(loss.detach(), reduction="mean").item())
            if not math.isfinite(losses[-1]):
                raise _diverged(run, "loss")
            accelerator.backward(loss)
            if run.preservation is not None:
                # After the backward pass of the images, so that preservation does not raise the peak memory.
                loss = run.preservation.loss(run, batch, number)
                kept.append(accelerator.reduce(loss.detach(), reduction="mean").item())
                losses[-1] += config.preservation.prior_loss_weight * kept[-1]
                if not math.isfinite(losses[-1]):
                    raise _diverged(run, "loss")
                accelerator.backward(config.preservation.prior_loss_weight * loss)
    learning_rate = effective_learning_rate(run.optimizer, run.lr_scheduler.get_last_lr()[0])
    grad_norm = _update(run)
    run.step += 1
    return StepReport(
        step=run.step,
        steps=run.steps,
        loss=sum(losses) / len(losses),
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        seconds=time.perf_counter() - started,
        images=run.images_per_step,
        preservation_loss=sum(kept) / len(kept) if kept else None,
        band_losses=run.bands.take(accelerator),
    )


def batch_loss(run: TrainState, batch: Batch) -> torch.Tensor:
    """Return the loss of one batch under the run's precision."""
    prediction = predict(run, batch)
    target = run.objective.target(batch.latents, batch.noise, batch.timesteps)
    losses = run.objective.sample_losses(prediction, target, batch.timesteps, batch.mask)
    run.bands.add(losses, batch.timesteps)
    return losses.mean()


def _update(run: TrainState) -> float:
    """Update the tuner with the gradient averaged over all processes, and return its norm before clipping."""
    accelerator, parameters = run.accelerator, list(run.tuner.parameters())
    average_gradients(accelerator, parameters)
    grad_norm = float(accelerator.clip_grad_norm_(parameters, run.config.optimizer.max_grad_norm))
    if not math.isfinite(grad_norm) and accelerator.scaler is None:
        raise _diverged(run, "gradient")
    run.optimizer.step()
    run.optimizer.zero_grad()
    if not run.optimizer.step_was_skipped:
        run.lr_scheduler.step()
    return grad_norm


def _diverged(run: TrainState, what: str) -> TrainingError:
    config = run.config
    remedy = f"lower the learning rate (now {config.optimizer.learning_rate:g})"
    if config.memory.mixed_precision == "fp16":
        remedy = f"fp16 may have overflowed: try bf16, or {remedy}"
    checkpoint = latest_checkpoint(config.output)
    kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint had been saved yet"
    return TrainingError(f"Stopped at step {run.step + 1}: the {what} is not a finite number; {remedy}; {kept}.")
