"""Callbacks that report progress and metrics of training to the terminal and the log."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from tqdm.auto import tqdm

from ...utils.atomic_write import atomic_write
from ...utils.display import counted, readable_size
from ..advice import warnings_of
from ..quantization import parameter_bytes
from ..state import StepReport, TrainState
from ..validation.loss import TIMESTEPS
from .base import Callback
from .metrics_file import METRICS_FILE
from .peak_memory import peak_memory, reset_peak_memory
from .validation_loss import loss_interval

# Losses of single steps vary far more by their random timesteps than by learning.
LOSS_WINDOW = 50


def describe_plan(run: TrainState) -> str:
    """Return a summary of the run in a few lines: base, data, tuner, steps and memory."""
    config, cache = run.config, run.cache
    images = run.images_per_step
    epochs = run.steps * images / sum(cache.repeats)
    derived = f" ({run.length.origin})" if run.length.origin else ""
    precision = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}[config.memory.mixed_precision]
    # weight, gradient and two moments of Adam, four bytes each
    tuner_memory, base_memory = run.tuner.num_parameters() * 16, parameter_bytes(run.pipeline.unet)
    started = f", from {run.initial.file}" if run.initial is not None else ""
    lines = [
        f"base        {config.base} ({run.objective.prediction_type}, {precision}, {run.accelerator.device})",
        *([f"vae         {config.vae}"] if config.vae is not None else []),
        *_describe_data(run),
        *_describe_variants(run),
        *_describe_held_out(run),
        *_describe_metrics(run),
        f"tuner       {' + '.join(config.kinds)}, {run.tuner.num_parameters():,} parameters{started}",
        *([f"teacher     {run.teacher.describe()}"] if run.teacher is not None else []),
        *(["masks       random in every step"] if cache.images else []),
        *([f"control     {run.conditions.describe()}"] if run.conditions is not None else []),
        *([f"preserved   {run.preservation.describe()}"] if run.preservation is not None else []),
        *([run.image_loss.describe()] if run.image_loss is not None else []),
        f"training    {counted(run.steps, 'step')} of {counted(images, 'image')} = {epochs:.1f} epochs{derived}",
        f"memory      U-Net {readable_size(base_memory)}, tuner and optimizer {readable_size(tuner_memory)}, "
        f"cached data {readable_size(cache.bytes)} (in main memory), and activations",
        f"output      {config.file}",
        *_describe_start(run),
        *(f"warning     {warning}" for warning in warnings_of(run)),
    ]
    return "\n".join(lines)


def _describe_start(run: TrainState) -> list[str]:
    if run.resumed_from is not None:
        return [f"resumed     from {run.resumed_from}, after step {run.step}"]
    if run.config.checkpoints.resume:
        return [f"resumed     nothing: there is no checkpoint in {run.config.output}, so training starts anew"]
    return []


def _describe_data(run: TrainState) -> list[str]:
    if run.data is None:
        return [f"images      {len(run.cache)} at {run.resolution} x {run.resolution}"]
    data = run.data
    name = "latents" if run.config.teacher.generates else "images"
    lines = [f"{name:<12}{data.images_line(run.resolution)}"]
    for name, facts in (
        ("left out", data.notes()),
        ("truncated", data.truncated()),
        ("hint", data.hints),
        ("not used", data.unused()),
    ):
        lines += [f"{'' if number else name:<12}{fact}" for number, fact in enumerate(facts)]
    return lines


def _describe_variants(run: TrainState) -> list[str]:
    """Describe the variants of captions and the memory of their text embeddings."""
    line = run.data.variants_line() if run.data is not None else None
    if line is None:
        return []
    embeddings = counted(len(run.cache.conditionings), "text embedding")
    return [f"variants    {line}; {embeddings} take {readable_size(run.cache.text_bytes)} of main memory"]


def _describe_held_out(run: TrainState) -> list[str]:
    if run.held_out is None or run.data is None:
        return []
    interval = loss_interval(run.config.validation, run.steps)
    passes = TIMESTEPS * len(run.held_out.cache)
    every = f"loss every {counted(interval, 'step')}, {passes} forward passes each"
    return [f"held out    {run.data.held_out_line()}; {every}"]


def _describe_metrics(run: TrainState) -> list[str]:
    lines = run.metrics.describe() if run.metrics is not None else []
    return [f"{'' if number else 'metrics':<12}{line}" for number, line in enumerate(lines)]


class SheetFile(Callback):
    """Write `data.json`: the training data, and which files are left out and why."""

    def on_start(self, run: TrainState) -> None:
        """Write the file."""
        if run.data is not None and run.accelerator.is_main_process:
            run.data.write(run.config.output)


class ProgressBar(Callback):
    """Progress bar with the smoothed loss, speed, remaining time and peak memory of the main process."""

    def __init__(self) -> None:
        self._recent: deque[StepReport] = deque(maxlen=LOSS_WINDOW)
        self._bar: Any = None

    def on_start(self, run: TrainState) -> None:
        """Show the bar."""
        shown = run.accelerator.is_main_process
        self._bar = tqdm(total=run.steps, initial=run.step, unit="step", desc=run.config.name, disable=not shown)

    def on_step(self, run: TrainState, report: StepReport) -> None:
        """Update the bar."""
        self._recent.append(report)
        loss = sum(recent.loss for recent in self._recent) / len(self._recent)
        speed = sum(recent.images for recent in self._recent) / sum(recent.seconds for recent in self._recent)
        memory = peak_memory(run.accelerator.device)
        used = f", {readable_size(memory)}" if memory is not None else ""
        self._bar.set_postfix_str(f"loss {loss:.4f}, {speed:.1f} images/s{used}", refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Close the bar; its last state stays on the terminal."""
        if self._bar is not None:
            self._bar.close()


class MetricsLog(Callback):
    """Log metrics of every step to `metrics.jsonl`, one JSON line per step, and to accelerate's trackers."""

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    def on_start(self, run: TrainState) -> None:
        """Open the log, and measure memory from here; a resumed run removes the lines of the steps that it repeats."""
        reset_peak_memory(run.accelerator.device)
        if run.accelerator.is_main_process:
            path = run.config.output / METRICS_FILE
            _keep_until(path, run.step or -1)
            self._file = path.open("a", encoding="utf-8")

    def on_step(self, run: TrainState, report: StepReport) -> None:
        """Log the step."""
        values = {
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
            "seconds": report.seconds,
            "images_per_second": report.images / report.seconds,
            **{f"loss_by_timestep/{band}": loss for band, loss in report.band_losses.items()},
        }
        if report.preservation_loss is not None:
            values["preservation_loss"] = report.preservation_loss
        memory = peak_memory(run.accelerator.device)
        if memory is not None:
            values["peak_memory_mib"] = memory / 2**20
        self._write(run, report.step, values)

    def note(self, run: TrainState, values: dict[str, float]) -> None:
        """Log metrics of the current step on a separate line."""
        self._write(run, run.step, values)

    def _write(self, run: TrainState, step: int, values: dict[str, float]) -> None:
        if self._file is not None:
            # JSON has no NaN and no infinity, which the gradient norm is where fp16 loss scaling skips a step.
            shown = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self._file.write(json.dumps({"step": step, **shown}, allow_nan=False) + "\n")
            self._file.flush()
        run.accelerator.log(values, step=step)

    def close(self) -> None:
        """Close the log."""
        if self._file is not None:
            self._file.close()


class Progress(Callback):
    """Call a function with the report of every step."""

    def __init__(self, function: Callable[[StepReport], None]) -> None:
        self._function = function

    def on_step(self, run: TrainState, report: StepReport) -> None:
        """Call the function."""
        self._function(report)


def _keep_until(path: Path, step: int) -> None:
    """Truncate a log to the steps up to this one, and remove incomplete lines of a crash."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    with atomic_write(path) as file:
        file.write("".join(kept).encode())
