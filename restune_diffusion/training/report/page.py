"""HTML page about one training run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from markupsafe import Markup

from ...evaluation.metric_names import METRICS
from ...storage.base_files.location import public_name
from ...utils.settings_merge import flat
from ..callbacks.metrics_file import Series
from ..config.config_file import recorded_yaml
from ..config.train_config import TrainConfig, current_names
from ..config.validation import logged_name
from ..validation.measurements import VALIDATION_LOSS
from .curves import plain, raw_and_smooth, several, smoothing_window
from .images import chosen_steps, data_url
from .run_folder import RunFolder
from .templates import template
from .usage import command_example, example_prompt, python_example

_MOST_STEPS = 6
_MOST_PROMPTS = 16
_BAND = "loss_by_timestep/"
# Metrics with their own place on the page.
_PLACED = {
    "loss",
    "learning_rate",
    "images_per_second",
    "seconds",
    "peak_memory_mib",
    "grad_norm",
    "drift",
    VALIDATION_LOSS,
}
_METRICS = {logged_name(name) for name in METRICS}


@dataclass(frozen=True)
class Chart:
    """Plot with its title and note."""

    title: str
    svg: Markup
    note: str = ""


@dataclass(frozen=True)
class Strip:
    """Samples of one prompt: step and image of each, None if the image cannot be read."""

    prompt: str
    images: list[tuple[int, str | None]]


def render(run: RunFolder) -> str:
    """Return the HTML page; all text from users is escaped."""
    steps = chosen_steps(list(run.samples), _MOST_STEPS)
    return template("page.html.j2").render(
        run=run,
        config=run.config,
        facts=_facts(run),
        strips=_strips(run, steps),
        steps_left_out=len(run.samples) - len(steps),
        charts=_charts(run.config, run.series),
        settings=_changed_settings(run.config),
        all_settings=recorded_yaml(run.config.recorded()),
        usage=_usage(run),
    )


def _facts(run: RunFolder) -> list[tuple[str, str]]:
    config, tuner = run.config, run.tuner
    facts = [("Tuner", " + ".join(config.kinds)), ("Base", Path(config.base).name or config.base)]
    if config.vae is not None:
        facts.append(("VAE", public_name(config.vae)))
    if tuner is not None:
        facts[0] = (
            "Tuner",
            f"{facts[0][1]}, {tuner[1].num_parameters:,} parameters, {tuner[1].bytes / 2**20:.1f} MiB",
        )
    facts.append(("Steps", f"{run.step:,} of {run.steps:,}"))
    if run.stopped_early is not None:
        facts.append(("Stopped early", run.stopped_early))
    losses = [value for _, value in run.series.get("loss", [])]
    if losses:
        window = smoothing_window(len(losses))
        first, last = (sum(each) / len(each) for each in (losses[:window], losses[-window:]))
        facts.append(("Loss", f"{first:.4f} → {last:.4f} (means of {window} steps)"))
    if held_out := run.series.get(VALIDATION_LOSS):
        step, lowest = min(held_out, key=lambda each: each[1])
        facts.append(
            ("Validation loss", f"{held_out[0][1]:.4f} → {held_out[-1][1]:.4f}, lowest {lowest:.4f} at {step}")
        )
    if run.best is not None:
        path, name, step, value = run.best
        facts.append(("Best tuner", f"{path.name}: {name} {value:.4f} at step {step}"))
    speeds = [value for _, value in run.series.get("images_per_second", [])]
    if speeds:
        facts.append(("Speed", f"{median(speeds):.3g} images/s"))
    seconds = [value for _, value in run.series.get("seconds", [])]
    if seconds:
        facts.append(("Time in steps", _duration(sum(seconds))))
        if run.step < run.steps and not run.finished:
            facts.append(("Time left", f"about {_duration((run.steps - run.step) * median(seconds[-50:]))}"))
    memory = [value for _, value in run.series.get("peak_memory_mib", [])]
    if memory:
        facts.append(("Peak memory", f"{max(memory) / 1024:.2f} GiB"))
    return facts


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _strips(run: RunFolder, steps: list[int]) -> list[Strip]:
    prompts = run.config.validation.prompts
    numbers = sorted({number for step in steps for number in run.samples[step]})[:_MOST_PROMPTS]
    return [
        Strip(
            prompts[number] if number < len(prompts) else f"sample {number}",
            [(step, data_url(run.samples[step][number]) if number in run.samples[step] else None) for step in steps],
        )
        for number in numbers
    ]


def _charts(config: TrainConfig, series: Mapping[str, Series]) -> list[Chart]:
    charts = []
    if loss := series.get("loss"):
        window = smoothing_window(len(loss))
        note = f"Each step (pale), and the mean of {window} steps. Steps differ mostly by their random timesteps."
        held_out = series.get(VALIDATION_LOSS, [])
        note += " Held-out images (orange) have the same noise and timesteps in each measurement." if held_out else ""
        beside = {"held-out images": held_out} if held_out else None
        charts.append(Chart("Loss", Markup(raw_and_smooth(loss, "loss by step", beside)), note))
    if bands := _bands(series):
        note = "Running means of the samples in each band of timesteps; high timesteps are noisy."
        charts.append(Chart("Loss by timestep", Markup(several(bands, "loss by step, for bands of timesteps")), note))
    if drift := series.get("drift"):
        note = "Change of the base's predictions on prompts without the subject, in percent; 0 is unchanged."
        charts.append(Chart("Drift", Markup(plain(drift, "drift by step")), note))
    charts += _metric_charts(series)
    if rate := series.get("learning_rate"):
        charts.append(Chart("Learning rate", Markup(plain(rate, "learning rate by step"))))
    if norm := series.get("grad_norm"):
        note = f"Before clipping to {config.optimizer.max_grad_norm:g}."
        charts.append(Chart("Gradient norm", Markup(raw_and_smooth(norm, "gradient norm by step")), note))
    for name, each in series.items():
        if name not in _PLACED | _METRICS and not name.startswith(_BAND):
            svg = raw_and_smooth(each, "a logged metric by step")
            charts.append(Chart(name.replace("_", " ").capitalize(), Markup(svg)))
    return charts


def _metric_charts(series: Mapping[str, Series]) -> list[Chart]:
    charts = []
    for key, metric in METRICS.items():
        if values := series.get(logged_name(key)):
            heading = "image drift" if key == "drift" else metric.heading
            shown = [(step, value * metric.factor) for step, value in values]
            note = f"Of the saved tuner: {metric.meaning.partition('. ')[0].rstrip('.')}."
            charts.append(Chart(heading[0].upper() + heading[1:], Markup(plain(shown, f"{heading} by step")), note))
    return charts


def _bands(series: Mapping[str, Series]) -> dict[str, Series]:
    """Return the losses by band, in ascending order of timesteps."""
    found = {}
    for name, each in series.items():
        first, _, last = name.removeprefix(_BAND).partition("-")
        if name.startswith(_BAND) and first.isdecimal() and last.isdecimal():
            found[int(first)] = (f"{first}-{last}", each)
    return dict(found[first] for first in sorted(found))


def _changed_settings(config: TrainConfig) -> list[tuple[str, str]]:
    """Return the settings that differ from the defaults, without local paths."""
    plain_config = TrainConfig(base="", data=Path(), output=Path(), tuner=config.tuner)
    usual = dict(flat(current_names(plain_config.recorded()))) if config.kinds == plain_config.kinds else {}
    return [
        (name, _shown(value))
        for name, value in flat(current_names(config.recorded()))
        # `part` is the constant that identifies a part's family, not a setting.
        if not name.endswith(".part") and value != usual.get(name, math.nan)
    ]


def _shown(value: Any) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def _usage(run: RunFolder) -> dict[str, Any] | None:
    if run.tuner is None:
        return None
    file, _, step = run.tuner
    captions = [caption.text for caption in run.data.captions] if run.data is not None else []
    prompt = example_prompt(run.config, captions)
    return {
        "step": step,
        "python": python_example(run.config, file, prompt),
        "command": command_example(run.config, file, prompt),
    }
