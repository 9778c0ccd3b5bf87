"""Stage that trains the bundled weights further whenever the processor has nothing else to do."""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from research.restune_tiny.parts.examples import Examples, caption_source
from research.restune_tiny.parts.log import append
from research.restune_tiny.parts.networks import TextAndUNet, new_scheduler
from research.restune_tiny.parts.precision import TRAINING_DTYPE
from research.restune_tiny.parts.trainer import Trainer, constant_rate
from research.restune_tiny.parts.yielding import Yielding
from research.restune_tiny.stages.denoiser import UNetJob, denoising_loss
from research.restune_tiny.stages.latents import encode_latents
from research.restune_tiny.stages.pipeline import export_pipeline

PID_FILE = "idle.pid"
_BATCH = 64


def train_idle(arguments: argparse.Namespace) -> None:
    """Continue from the newest checkpoint, or from exported weights, until the process is asked to end."""
    if arguments.signal is not None:
        send_signal(arguments.work, arguments.signal)
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    if (other := living_process(arguments.work)) is not None:
        raise SystemExit(f"Process {other} trains in {arguments.work}; end it first, or choose another folder.")
    arguments.export = arguments.export or arguments.work / "export"
    (arguments.work / PID_FILE).write_text(str(os.getpid()))
    torch.set_num_threads(1)
    if arguments.priority == "idle":
        yield_processor()
    idle = Idle(arguments)
    with Yielding() if arguments.priority == "idle" else nullcontext():
        if not (arguments.work / "latents.safetensors").exists():
            encode_latents(arguments)
        idle.run()


def yield_processor() -> None:
    """Run this process and its children only when no other process wants the core."""
    os.nice(19)
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


class Idle:
    """Training that pauses on SIGUSR1, goes on on SIGUSR2, and ends on SIGTERM or Ctrl-C, each with a checkpoint.

    Args:
        settings: options of the stage.
    """

    def __init__(self, settings: argparse.Namespace) -> None:
        self.settings = settings
        self.paused = self.ended = self._starting = False
        self._checkpoint = time.monotonic()
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def run(self) -> None:
        """Train and pause until the process is asked to end."""
        settings, used = self.settings, caption_source(self.settings).used
        held_out = HeldOut(settings)
        while not self.ended:
            if self.paused:
                signal.pause()
                continue
            # A paused process holds no worker and no compiled graph, so it takes no memory from a measurement.
            if (trainer := self._started()) is None:
                continue
            if trainer.steps == 0:
                held_out.record(trainer.averaged(), 0)

            def export(weights: dict[str, Tensor], trainer: Trainer = trainer) -> None:
                self._checkpoint = time.monotonic()
                error = held_out.record(weights, trainer.steps)
                print(f"{time.strftime('%H:%M:%S')} step {trainer.steps} held-out error {error:.5f}", flush=True)
                export_pipeline(weights, used, settings)

            trainer.run(export, self._is_due, lambda: self.paused or self.ended)
            if trainer.steps >= settings.steps:
                return

    def _started(self) -> Trainer | None:
        """Return a trainer, or None if a signal came while it started, which takes minutes when it compiles."""
        self._starting = True
        try:
            return Trainer(UNetJob(self.settings), self.settings, ("loss", "error"), constant_rate)
        except _Signalled:
            return None
        finally:
            self._starting = False

    def _is_due(self) -> bool:
        return time.monotonic() - self._checkpoint >= self.settings.checkpoint_minutes * 60

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.paused = number == signal.SIGUSR1 or (self.paused and number != signal.SIGUSR2)
        self.ended = self.ended or number in (signal.SIGTERM, signal.SIGINT)
        if self._starting and (self.paused or self.ended):
            self._starting = False
            raise _Signalled


class _Signalled(Exception):
    """Request to pause or end."""


class HeldOut:
    """Denoising error of icons that the stage does not train on, with the same noise each time.

    Stages before this one trained on them, so the error shows the change by this stage, and not how well the
    model knows icons that it never saw.

    Args:
        settings: options of the stage.
    """

    def __init__(self, settings: argparse.Namespace) -> None:
        self.log = settings.work / "idle-held-out.jsonl"
        self.pace = settings.micro * settings.batch
        examples = Examples(settings)
        rng = random.Random(0)
        captions, records = examples.captions, examples.captions.records
        self.latents = examples.latents[examples.held_out, 0].float()
        self.ids = captions.ids(
            [f"{captions.name(records[i], rng)}, {records[i]['style']}" for i in examples.held_out]
        )
        self.vocabulary = len(captions.used)

    @torch.no_grad()
    def error(self, weights: dict[str, Tensor]) -> float:
        """Return the mean squared error of the predicted velocities.

        Args:
            weights: of text encoder and U-Net, by parameter name.
        """
        module = TextAndUNet(self.vocabulary)
        module.load_state_dict(weights, strict=False)
        module = module.to(TRAINING_DTYPE).eval()
        signal_of_noise = new_scheduler().alphas_cumprod
        total = 0.0
        for start in range(0, len(self.latents), _BATCH):
            part = slice(start, start + _BATCH)
            torch.manual_seed(start)

            def predict(noisy: Tensor, timesteps: Tensor, part: slice = part) -> Any:
                return module(noisy, timesteps, self.ids[part])

            _, error = denoising_loss(predict, self.latents[part], signal_of_noise)
            total += error * len(self.latents[part])
        return total / len(self.latents)

    def record(self, weights: dict[str, Tensor], step: int) -> float:
        """Return the error, and append it to the log with the number of noisy latents seen.

        Args:
            weights: of text encoder and U-Net, by parameter name.
            step: number of optimizer steps.
        """
        error = self.error(weights)
        append(self.log, {"step": step, "noisy_latents": step * self.pace, "error": error, "time": time.time()})
        return error


def living_process(work: Path) -> int | None:
    """Return the id of the process that trains in a folder, or None.

    Args:
        work: folder of the checkpoints.
    """
    file = work / PID_FILE
    if not file.exists():
        return None
    number = int(file.read_text())
    try:
        # A number can be given to another process after a restart.
        command = Path(f"/proc/{number}/cmdline").read_bytes()
    except OSError:
        return None
    return number if b"pretrain_base" in command else None


def send_signal(work: Path, number: int) -> None:
    """Send a signal to the process that trains in a folder.

    Args:
        work: folder of the checkpoints.
        number: the signal.
    """
    process = living_process(work)
    if process is None:
        raise SystemExit(f"No process trains in {work}.")
    os.kill(process, number)
    print(f"Sent to process {process}.")
