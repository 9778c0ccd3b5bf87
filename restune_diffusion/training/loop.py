"""The training loop: forward, backward, optimizer step, and nothing else."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

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
from .transfers.to_host import Reading

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

    A callback ends the run early by setting `stopped_early` in `on_start`, or in `on_step` of a step after which some
    callback reads the state.

    On CUDA the numbers of a step are read while the device computes the next one, because a GPU that waits for the
    host between steps is idle. They are read at once where a callback uses the state after the step, and at the end.

    Raises:
        TrainingError: if the loss or the gradient is not finite. No callback has seen the state after that step. Where
            the numbers are read before the update, the tuner keeps its last finite state.
        TrainingInterrupted: if a stop is requested before the last step; the current step is finished first.
    """
    skipped = 0
    behind: _Step | None = None
    try:
        for callback in callbacks:
            callback.on_start(run)
        while run.step < run.steps and run.stopped_early is None:
            if stop is not None and stop.agreed(run.accelerator):
                _report(run, behind, callbacks)
                raise _interrupted(run, callbacks, stop)
            try:
                step = _launch(run)
            except Exception:
                # The step before is complete, and is logged as where its numbers are read at once.
                _report(run, behind, callbacks)
                raise
            for callback in callbacks:
                callback.on_update(run)
            _report(run, behind, callbacks)
            behind = step
            skipped = skipped + 1 if step.skipped else 0
            if skipped > _MAX_SKIPPED_STEPS:
                raise _diverged(run, step.number, "gradient")
            last = run.step == run.steps
            if step.numbers.ready or last or any(callback.reads_state(run, run.step) for callback in callbacks):
                _report(run, step, callbacks)
                behind = None
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


@dataclass
class _Step:
    """An optimizer step whose numbers are on their way to the host.

    These are the losses of its batches, their preservation losses, the sums of the timestep bands, the gradient norm,
    and the effective learning rate if the optimizer computes it on the device.
    """

    number: int
    learning_rate: float | None
    batches: int
    preserved: bool
    numbers: Reading
    seconds: float = 0.0
    """Time of the host for launching the step and waiting for its numbers."""
    skipped: bool = False
    """Whether fp16 loss scaling found an overflow and skipped the update."""


def _launch(run: TrainState) -> _Step:
    """Launch the computations of one optimizer step."""
    started = time.perf_counter()
    config, accelerator = run.config, run.accelerator
    losses, kept = [], []
    for micro_step in range(config.gradient_accumulation_steps):
        number = run.step * config.gradient_accumulation_steps + micro_step
        number = number * accelerator.num_processes + accelerator.process_index
        batch = run.batches[number]
        with accelerator.accumulate():
            loss = batch_loss(run, batch)
            losses.append(loss.detach())
            accelerator.backward(loss)
            if run.preservation is not None:
                # After the backward pass of the images, so that preservation does not raise the peak memory.
                loss = run.preservation.loss(run, batch, number)
                kept.append(loss.detach())
                accelerator.backward(config.preservation.prior_loss_weight * loss)
    parameters = list(run.tuner.parameters())
    average_gradients(accelerator, parameters)
    grad_norm = accelerator.clip_grad_norm_(parameters, config.optimizer.max_grad_norm)
    rate = effective_learning_rate(run.optimizer, run.lr_scheduler.get_last_lr()[0])
    computed = [rate] if isinstance(rate, torch.Tensor) else []
    numbers = Reading(_numbers(run, [*losses, *kept], [grad_norm, *computed]))
    known = None if isinstance(rate, torch.Tensor) else rate
    step = _Step(run.step + 1, known, len(losses), bool(kept), numbers)
    if step.numbers.ready:
        _check(run, step)
    run.optimizer.step()
    run.optimizer.zero_grad()
    # Loss scaling skips an update that is not finite, and the schedule counts updates. So fp16 waits here, for the
    # gradient norm, while the device updates the tuner.
    step.skipped = accelerator.scaler is not None and not math.isfinite(_norm(run, step))
    if not step.skipped:
        run.lr_scheduler.step()
    run.step += 1
    step.seconds = time.perf_counter() - started
    return step


def _numbers(run: TrainState, losses: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the numbers of a step as one tensor: sums over all processes, and then numbers that all have."""
    device = run.accelerator.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    # One sum for all processes: each then finds the same step at fault, and stops there.
    own = torch.cat([torch.stack(list(losses)).to(dtype), run.bands.take(device).to(dtype)])
    shared = run.accelerator.reduce(own, reduction="sum")
    return torch.cat([shared, *(number.to(device, dtype).reshape(1) for number in others)])


def _norm(run: TrainState, step: _Step) -> float:
    """Return the gradient norm of a step before clipping."""
    return step.numbers.result()[_first_after_losses(step) + 2 * len(run.bands.names)]


def _first_after_losses(step: _Step) -> int:
    return step.batches * (1 + step.preserved)


def _losses(run: TrainState, step: _Step) -> tuple[list[float], list[float]]:
    """Return the loss of each batch, including preservation, and the preservation losses alone."""
    means = [total / run.accelerator.num_processes for total in step.numbers.result()[: _first_after_losses(step)]]
    losses, kept = means[: step.batches], means[step.batches :]
    weight = run.config.preservation.prior_loss_weight
    return [loss + weight * other for loss, other in zip(losses, kept or [0.0] * len(losses), strict=True)], kept


def _check(run: TrainState, step: _Step) -> None:
    """Raise `TrainingError` if the step's loss is not finite, or its gradient without loss scaling."""
    if not all(map(math.isfinite, _losses(run, step)[0])):
        raise _diverged(run, step.number, "loss")
    if run.accelerator.scaler is None and not math.isfinite(_norm(run, step)):
        raise _diverged(run, step.number, "gradient")


def _report(run: TrainState, step: _Step | None, callbacks: Sequence[Callback]) -> None:
    """Wait for the numbers of a step and report them."""
    if step is None:
        return
    started = time.perf_counter()
    numbers = step.numbers.result()
    seconds = step.seconds + time.perf_counter() - started
    _check(run, step)
    losses, kept = _losses(run, step)
    first = _first_after_losses(step)
    report = StepReport(
        step=step.number,
        steps=run.steps,
        loss=sum(losses) / len(losses),
        grad_norm=_norm(run, step),
        learning_rate=numbers[-1] if step.learning_rate is None else step.learning_rate,
        seconds=seconds,
        images=run.images_per_step,
        preservation_loss=sum(kept) / len(kept) if kept else None,
        band_losses=run.bands.means(numbers[first : first + 2 * len(run.bands.names)]),
    )
    for callback in callbacks:
        callback.on_step(run, report)


def batch_loss(run: TrainState, batch: Batch) -> torch.Tensor:
    """Return the loss of one batch under the run's precision."""
    prediction = predict(run, batch)
    target = run.objective.target(batch.latents, batch.noise, batch.timesteps)
    losses = run.objective.sample_losses(prediction, target, batch.timesteps, batch.mask)
    run.bands.add(losses, batch.timesteps)
    return losses.mean()


def _diverged(run: TrainState, number: int, what: str) -> TrainingError:
    """Return the error of a step, and let the run count the steps before it."""
    run.step = number - 1
    config = run.config
    remedy = f"lower the learning rate (now {config.optimizer.learning_rate:g})"
    if config.memory.mixed_precision == "fp16":
        remedy = f"fp16 may have overflowed: try bf16, or {remedy}"
    checkpoint = latest_checkpoint(config.output)
    kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint had been saved yet"
    return TrainingError(f"Stopped at step {number}: the {what} is not a finite number; {remedy}; {kept}.")
