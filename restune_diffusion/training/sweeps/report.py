"""Results of a sweep: a table, a JSON summary, and a contact sheet of samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from PIL import Image

from ...imaging.contact_sheet import labelled_grid
from ...utils.atomic_write import atomic_write
from ..callbacks.metrics_file import METRICS_FILE, read_metrics
from ..callbacks.reporting import LOSS_WINDOW
from ..validation.measurements import VALIDATION_LOSS


@dataclass(frozen=True)
class SweepRow:
    """Result of one tuner of a sweep; `error` is the reason if it stopped early.

    `loss` is the mean of its last 50 steps, and `validation_loss` the last loss of the held-out images, if there are
    any. Both are None on processes other than the main one.
    """

    name: str
    settings: dict[str, str]
    steps: int
    loss: float | None
    file: Path | None
    error: str | None = None
    validation_loss: float | None = None


@dataclass(frozen=True)
class SweepResult:
    """Results of all tuners of a sweep; `summary` is a JSON file of the rows, `sheet` a contact sheet of samples."""

    rows: tuple[SweepRow, ...]
    summary: Path
    seconds: float
    sheet: Path | None = None

    def with_sheet(self, sheet: Path | None) -> SweepResult:
        """Return a copy with the contact sheet."""
        return replace(self, sheet=sheet)

    def table(self) -> str:
        """Return the rows as a text table, sorted by ascending loss: that of held-out images, if there are any."""
        validated = any(row.validation_loss is not None for row in self.rows)
        loss_of = {row.name: row.validation_loss if validated else row.loss for row in self.rows}
        ordered = sorted(self.rows, key=lambda row: (loss_of[row.name] is None, loss_of[row.name] or 0.0))
        names = list(ordered[0].settings)
        cells = [[*names, "loss", *(["validation"] if validated else []), "file"]]
        for row in ordered:
            loss = "stopped" if row.error is not None else _shown(row.loss)
            held_out = [_shown(row.validation_loss)] if validated else []
            cells.append([*row.settings.values(), loss, *held_out, str(row.file or row.error)])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
        )


def _shown(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def final_loss(output: Path) -> float | None:
    """Return the mean loss of the last 50 steps of the run in an output folder, or None if it has no steps."""
    losses = [loss for _, loss in read_metrics(output / METRICS_FILE).get("loss", [])[-LOSS_WINDOW:]]
    return mean(losses) if losses else None


def last_validation_loss(output: Path) -> float | None:
    """Return the last loss of the held-out images of the run in an output folder, or None if it measured none."""
    losses = read_metrics(output / METRICS_FILE).get(VALIDATION_LOSS, [])
    return losses[-1][1] if losses else None


def write_summary(result: SweepResult) -> None:
    """Write the rows as JSON, with paths relative to its folder."""
    folder = result.summary.parent

    def plain(row: SweepRow) -> dict[str, Any]:
        file = None if row.file is None else row.file.relative_to(folder).as_posix()
        return {**vars(row), "file": file}

    with atomic_write(result.summary) as file:
        file.write(json.dumps([plain(row) for row in result.rows], indent=2).encode())


def comparison(columns: Mapping[str, Path], prompts: Sequence[str], path: Path) -> Path | None:
    """Write a contact sheet of samples, with a row for each prompt.

    Args:
        columns: sample folder of each column, by its title.
        prompts: prompts of the samples.
        path: path of the sheet.

    Returns:
        The path, or None if there are no samples.
    """
    if not columns:
        return None
    rows = [[_image(folder / f"{number:02d}.png") for folder in columns.values()] for number in range(len(prompts))]
    with atomic_write(path) as file:
        labelled_grid(rows, prompts, list(columns)).save(file, format="PNG")
    return path


def _image(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
