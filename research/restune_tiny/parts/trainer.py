"""Training loop of the stages: worker processes, optimizer, checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from research.restune_tiny.parts.flat import Flat
from research.restune_tiny.parts.folders import replace_folder
from research.restune_tiny.parts.log import append
from research.restune_tiny.parts.optimizers import new_optimizers
from research.restune_tiny.parts.yielding import die_with_parent


class Job(Protocol):
    """Interface of a training stage; instances are sent to the worker processes."""

    dtype: torch.dtype
    """Dtype of the computation in the workers."""

    def build(self) -> nn.Module:
        """Return the newly initialized module to train."""

    def prepare(self, module: nn.Module) -> Callable[[int, int], dict[str, float]]:
        """Load data and return a function that adds the gradient of micro-batch (step, index) and returns metrics."""


@dataclass
class Shared:
    """State shared by the processes.

    Each worker takes the next micro-batch when it is free, so a core with other load slows training only by its own
    share. Threads of one process would all wait for the slowest.
    """

    values: Tensor
    gradients: Tensor
    reports: Tensor
    counts: Tensor
    step: Any
    taken: Any
    micro: int
    gate: Any


def work(rank: int, job: Job, shared: Shared) -> None:
    """Run a worker process: compute gradients of micro-batches until the trainer ends it."""
    torch.set_num_threads(1)
    die_with_parent()
    threading.Thread(target=end_with_parent, daemon=True).start()
    module = job.build().to(job.dtype)
    flat = Flat(module)
    gradients = torch.zeros(flat.size, dtype=job.dtype)
    flat.bind(module, shared.values, gradients)
    run = job.prepare(module)
    with contextlib.suppress(threading.BrokenBarrierError):
        for turn in range(shared.reports.shape[0]):
            if turn == rank:  # in turn: the first worker compiles, the others use the compiler's cache
                run(0, 0)
            shared.gate.wait()
        compute(rank, run, shared, gradients)


def compute(rank: int, run: Callable[[int, int], dict[str, float]], shared: Shared, gradients: Tensor) -> None:
    """Compute gradients of micro-batches until the gate breaks."""
    while True:
        shared.gate.wait()
        shared.counts[rank] = 0
        while (index := take(shared)) < shared.micro:
            gradients.zero_()
            numbers = torch.tensor(list(run(shared.step.value, index).values()), dtype=torch.float64)
            if shared.counts[rank] == 0:
                shared.gradients[rank].copy_(gradients)
                shared.reports[rank] = numbers
            else:
                shared.gradients[rank].add_(gradients)
                shared.reports[rank] += numbers
            shared.counts[rank] += 1
        shared.gate.wait()


def end_with_parent() -> None:
    """End this process when the trainer is gone: killed, it cannot terminate its workers."""
    parent = mp.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def micro_seed(seed: int, step: int, index: int) -> int:
    """Return the seed of a micro-batch; its randomness depends only on its step and index."""
    return seed * 1_000_003 + step * 64 + index


def take(shared: Shared) -> int:
    """Return the index of the next free micro-batch."""
    with shared.taken.get_lock():
        index: int = shared.taken.value
        shared.taken.value = index + 1
    return index


def shared_copy(tensor: Tensor) -> Tensor:
    """Return a tensor moved to shared memory."""
    shared: Tensor = tensor.share_memory_()
    return shared


class Trainer:
    """Float32 weights, optimizer, EMA and checkpoints, with one worker per core.

    Args:
        job: the stage.
        settings: options of the stage.
        keys: names of the metrics that the job returns.
        schedule: function of step, number of steps, peak and warmup to the learning rate; `learning_rate` by default.
    """

    def __init__(
        self,
        job: Job,
        settings: argparse.Namespace,
        keys: Sequence[str],
        schedule: Callable[[int, int, float, int], float] | None = None,
    ) -> None:
        self.schedule = schedule or learning_rate
        module = job.build()
        self.flat, self.keys, self.settings, self.steps = Flat(module), keys, settings, 0
        self.master = self.flat.gather(module)
        self.ema = self.master.clone()
        self.first_moment, self.second_moment = torch.zeros_like(self.ema), torch.zeros_like(self.ema)
        self.checkpoint = settings.work / f"{settings.stage}-checkpoint"
        self.log = settings.work / f"{settings.stage}-log.jsonl"
        if self.checkpoint.exists():
            self.load()
        self.gradient = torch.zeros_like(self.ema)
        moments = self.first_moment, self.second_moment
        muon = settings.optimizer == "muon"
        self.optimizers = new_optimizers(self.flat, self.master, self.gradient, moments, self.steps, muon)
        context = mp.get_context("spawn")
        workers = settings.workers
        self.shared = Shared(
            values=shared_copy(self.master.to(job.dtype, copy=True)),
            gradients=shared_copy(torch.zeros(workers, self.flat.size)),
            reports=shared_copy(torch.zeros(workers, len(keys), dtype=torch.float64)),
            counts=shared_copy(torch.zeros(workers, dtype=torch.int64)),
            step=context.Value("l", 0),
            taken=context.Value("l", 0),
            micro=settings.micro,
            gate=context.Barrier(workers + 1),
        )
        arguments = [(rank, job, self.shared) for rank in range(workers)]
        self.workers = [context.Process(target=work, args=own, daemon=True) for own in arguments]
        self._closed = threading.Event()
        try:
            for worker in self.workers:
                worker.start()
            threading.Thread(target=self._watch, daemon=True).start()
            for _ in range(workers):
                self._wait()
        except BaseException:
            self.close()
            raise

    def _watch(self) -> None:
        """Break the gate when a worker has ended: how long a step takes on a busy machine is unknown."""
        while not self._closed.wait(1):
            if not all(worker.is_alive() for worker in self.workers):
                self.shared.gate.abort()
                return

    def _wait(self) -> None:
        try:
            self.shared.gate.wait()
        except threading.BrokenBarrierError:
            message = "A worker process has ended; run the command again to go on from the checkpoint."
            raise SystemExit(message) from None

    @torch.no_grad()
    def step(self) -> dict[str, float]:
        """Run one optimizer step and return the workers' metrics, gradient norm and learning rate."""
        self.shared.step.value, self.shared.taken.value = self.steps, 0
        self._wait()
        self._wait()
        busy = [rank for rank, count in enumerate(self.shared.counts.tolist()) if count]
        gradient = self.gradient.copy_(self.shared.gradients[busy[0]])
        for rank in busy[1:]:
            gradient += self.shared.gradients[rank]
        settings, norm = self.settings, float(gradient.norm()) / self.shared.micro
        gradient *= min(1.0, settings.clip / (norm + 1e-6)) / self.shared.micro
        self.steps += 1
        lr = self.schedule(self.steps, settings.steps, settings.lr, settings.warmup)
        self.optimizers.step(lr)
        self.ema.lerp_(self.master, 1 - min(settings.ema, (1 + self.steps) / (10 + self.steps)))
        self.shared.values.copy_(self.master)
        reports = self.shared.reports[busy].sum(0) / self.shared.micro
        numbers = dict(zip(self.keys, reports.tolist(), strict=True))
        return numbers | {"norm": norm, "lr": lr}

    def averaged(self) -> dict[str, Tensor]:
        """Return the EMA weights by parameter name."""
        return {name: view.clone() for name, view in self.flat.views(self.ema).items()}

    def save(self) -> None:
        """Write a checkpoint atomically.

        The randomness of a micro-batch depends only on its step and index, so the step is the only random state.
        """
        temporary = self.checkpoint.with_name(self.checkpoint.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tensors = {"master": self.master, "ema": self.ema}
        moments = {"first_moment": self.first_moment, "second_moment": self.second_moment}
        save_file(tensors | moments, temporary / "state.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": self.steps}))
        replace_folder(temporary, self.checkpoint)

    @torch.no_grad()
    def load(self) -> None:
        """Restore the state of a checkpoint."""
        for name, tensor in load_file(self.checkpoint / "state.safetensors").items():
            getattr(self, name).copy_(tensor)
        self.steps = json.loads((self.checkpoint / "state.json").read_text())["step"]

    def run(
        self,
        export: Callable[[dict[str, Tensor]], None],
        export_every: int | Callable[[], bool],
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Train to the last step, with regular log lines, checkpoints and exports.

        Args:
            export: called with the averaged weights after each checkpoint.
            export_every: steps between checkpoints, or a function that tells after each step whether one is due.
            stop: tells after each step whether to end early, with a checkpoint.
        """
        due = export_every if callable(export_every) else lambda: self.steps % export_every == 0
        started, first, settings = time.time(), self.steps, self.settings
        while self.steps < settings.steps:
            numbers = self.step()
            if self.steps % settings.print_every == 0:
                seconds = time.time() - started
                speed = (self.steps - first) * settings.micro * settings.batch / seconds
                text = " ".join(f"{key} {value:.4g}" for key, value in numbers.items())
                print(f"{time.strftime('%H:%M:%S')} step {self.steps} {text} {speed:.0f} images/s", flush=True)
                # The number of images per step is a setting that can change in a resumed run.
                pace = {"images_per_step": settings.micro * settings.batch, "images_per_second": speed}
                append(self.log, {"step": self.steps, **numbers, **pace, "seconds": seconds})
            stopped = stop()
            if due() or stopped or self.steps >= settings.steps:
                self.save()
                export(self.averaged())
            if stopped:
                break
        self.close()

    def close(self) -> None:
        """Kill the workers, which otherwise wait for another step."""
        self._closed.set()
        for worker in self.workers:
            if worker.is_alive():
                worker.kill()  # also one that is stopped
                worker.join()


def constant_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Return the learning rate of a step in a run without an end: linear warmup, then the peak."""
    return peak * min(1.0, step / max(1, warmup))


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Return the learning rate of a step: linear warmup, then cosine decay to a fiftieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
