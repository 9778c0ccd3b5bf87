"""HTML page about a sweep: its tuners side by side."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from markupsafe import Markup

from ...utils.settings_merge import flat
from ..callbacks.reporting import LOSS_WINDOW
from ..config.train_config import current_names
from ..output_folder import CONFIG_FILE
from ..validation.measurements import VALIDATION_LOSS
from .curves import several
from .images import data_url
from .page import Chart
from .run_folder import RunFolder, read_run_folder
from .templates import template

_MOST_CURVES = 8
_MOST_PROMPTS = 16
# What differs between any two runs of a sweep and tells nothing about them.
_OWN = {"name", "output"}


@dataclass(frozen=True)
class Comparison:
    """Samples of one prompt: title and image of each column, None where a tuner has no sample."""

    prompt: str
    images: list[tuple[str, str | None]]


def runs_of_sweep(folder: Path) -> list[RunFolder]:
    """Return the runs of a sweep's folder by ascending loss: that of held-out images, if there are any.

    The list is empty if it is not the folder of a sweep.
    """
    if (folder / CONFIG_FILE).is_file() or not folder.is_dir():
        return []
    runs = [read_run_folder(each) for each in sorted(folder.iterdir()) if (each / CONFIG_FILE).is_file()]
    return sorted(runs, key=_validation_loss if _validated(runs) else _loss)


def render_sweep(folder: Path, runs: list[RunFolder]) -> str:
    """Return the HTML page; all text from users is escaped."""
    settings = _differing_settings(runs)
    errors = _errors(folder)
    return template("sweep.html.j2").render(
        name=folder.resolve().name,
        base=Path(runs[0].config.base).name or runs[0].config.base,
        settings=list(settings),
        validated=_validated(runs),
        runs=[
            {
                "name": run.config.name,
                "settings": [values[number] for values in settings.values()],
                "step": run.step,
                "steps": run.steps,
                "loss": _shown_loss(_loss(run)),
                "validation_loss": _shown_loss(_validation_loss(run)),
                "error": errors.get(run.config.name),
            }
            for number, run in enumerate(runs)
        ],
        unfinished=sum(not run.finished for run in runs),
        strips=_strips(runs),
        charts=_charts(runs),
        example=runs[0].path,
    )


def _loss(run: RunFolder) -> float:
    losses = [value for _, value in run.series.get("loss", [])[-LOSS_WINDOW:]]
    return mean(losses) if losses else math.inf


def _validation_loss(run: RunFolder) -> float:
    losses = run.series.get(VALIDATION_LOSS, [])
    return losses[-1][1] if losses else math.inf


def _validated(runs: list[RunFolder]) -> bool:
    return any(VALIDATION_LOSS in run.series for run in runs)


def _shown_loss(loss: float) -> str:
    return "" if math.isinf(loss) else f"{loss:.4f}"


def _differing_settings(runs: list[RunFolder]) -> dict[str, list[str]]:
    """Return the values of each setting that differs between the runs, in the order of the runs."""
    recorded = [dict(flat(current_names(run.config.recorded()))) for run in runs]
    names = list(dict.fromkeys(name for each in recorded for name in each))
    found = {}
    for name in names:
        values = [_shown(each.get(name)) for each in recorded]
        if name not in _OWN and len(set(values)) > 1:
            found[name] = values
    return found


def _shown(value: Any) -> str:
    return "" if value is None else "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def _errors(folder: Path) -> dict[str, str]:
    """Return why tuners stopped, by name, from the summary that a finished sweep writes."""
    try:
        rows = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
        return {str(row["name"]): str(row["error"]) for row in rows if row.get("error")}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}  # not finished yet, or not written by a sweep


def _strips(runs: list[RunFolder]) -> list[Comparison]:
    """Return the newest samples of each tuner, after the start, which is drawn once and belongs to all."""
    start = next((run.samples[0] for run in runs if 0 in run.samples), {})
    columns = [("start", start)] if start else []
    columns += [
        (f"{run.config.name}, step {step}", run.samples[step])
        for run in runs
        if (step := max(run.samples, default=0)) > 0
    ]
    prompts = runs[0].config.validation.prompts
    numbers = sorted({number for _, samples in columns for number in samples})[:_MOST_PROMPTS]
    return [
        Comparison(
            prompts[number] if number < len(prompts) else f"sample {number}",
            [(title, data_url(samples[number]) if number in samples else None) for title, samples in columns],
        )
        for number in numbers
    ]


def _charts(runs: list[RunFolder]) -> list[Chart]:
    charts = []
    for name, title, note in (
        ("loss", "Loss", "Running means."),
        (VALIDATION_LOSS, "Validation loss", "Loss of the held-out images."),
    ):
        curves = {run.config.name: run.series[name] for run in runs if run.series.get(name)}
        shown = dict(list(curves.items())[:_MOST_CURVES])
        if shown:
            note += f" The {len(shown)} tuners of lowest loss." if len(curves) > len(shown) else ""
            label = f"{title.lower()} by step, for each tuner"
            charts.append(Chart(title, Markup(several(shown, label, columns=2)), note))
    return charts
