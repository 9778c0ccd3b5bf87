"""Contact sheet of prompts by tuners and weights: its settings, its columns and its images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import tyro
from pydantic import Field

from .settings import SamplingSettings, generator

if TYPE_CHECKING:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

Column = tuple[str, dict[str, float] | None]
"""Label of a column, and weight of each tuner; None for the column of the base."""


class GridSettings(SamplingSettings):
    """Settings of a contact sheet of prompts by tuners and weights."""

    tuner: tuple[str, ...] = ()
    """Tuner files. A file with a weight after a colon, `watercolor.safetensors:0.8`, gets one column, at that
    weight."""
    weights_of_columns: Annotated[tuple[float, ...], tyro.conf.arg(name="weights")] = Field((1.0,), min_length=1)
    """Weights of each tuner, one column per weight."""
    mix: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Add a column with all tuners combined, each at its weight after the colon, or 1."""
    share_steps: int = Field(default=0, ge=0)
    """Initial denoising steps shared by all columns of a row. A few shared steps keep one composition and save
    time."""
    columns_at_once: int = Field(default=4, gt=0)
    """Columns generated in one batch; fewer need less memory."""

    def columns(self) -> list[Column]:
        """Return the columns: the base, each tuner at its weights, and the mix."""
        from .mix import distinct_labels, unique_names

        files = self.files()
        paths = [path for path, _ in files]
        names, labels = unique_names(paths), distinct_labels(paths)
        # A file that is given twice is labeled by the name that options of tuners use.
        labels = [name if labels.count(label) > 1 else label for name, label in zip(names, labels, strict=True)]
        columns: list[Column] = [("base", None)]
        arguments = (*self.tuner, *self.lora)
        for name, label, argument, (path, weight) in zip(names, labels, arguments, files, strict=True):
            weights = self.weights_of_columns if path == argument else (weight,)
            columns += [(label if weights == (1.0,) else f"{label} {value:g}", {name: value}) for value in weights]
        if self.mix:
            columns.append(("mix", {name: weight for name, (_, weight) in zip(names, files, strict=True)}))
        return columns

    def row(
        self, pipeline: Any, prompt: str, seed: int, columns: list[Column], arguments: dict[str, Any]
    ) -> list[Image.Image]:
        """Generate the images of a row; the columns of one batch have the same text.

        Args:
            pipeline: the result of `prepare`.
            prompt: prompt of the row.
            seed: seed of the row.
            columns: the result of `columns`.
            arguments: the result of `arguments`, and further arguments of the pipeline.
        """
        from ..prompt_encoding import text_tuner_names

        by_text: dict[tuple[tuple[str, float], ...], list[int]] = {}
        with_text = text_tuner_names(pipeline)
        for number, (_, weights) in enumerate(columns):
            text = tuple((name, weight) for name, weight in (weights or {}).items() if name in with_text and weight)
            by_text.setdefault(text, []).append(number)
        images: dict[int, Image.Image] = {}
        for text, numbers in by_text.items():
            for first in range(0, len(numbers), self.columns_at_once):
                batch = numbers[first : first + self.columns_at_once]
                mixes = [columns[number][1] for number in batch]
                result = pipeline.branches(
                    prompt, mixes, self.share_steps, trunk=dict(text), generator=generator(seed), **arguments
                )
                images |= dict(zip(batch, result.images, strict=True))
        return [images[number] for number in range(len(columns))]

    def rows(self) -> list[tuple[str, int]]:
        """Return prompt and seed of each row."""
        return [(prompt, seed) for prompt in self.prompt for seed in self.seeds]

    def sheet(self, images: list[list[Image.Image]], columns: list[Column], cell: int | None = None) -> Image.Image:
        """Return the labeled sheet.

        Args:
            images: the images of each row.
            columns: the result of `columns`.
            cell: side of the square that each image is fitted into, in pixels; a moderate size by default.
        """
        from ...imaging.contact_sheet import fitting_cell, labelled_grid

        rows = self.rows()
        labels = [f"{prompt} (seed {seed})" if self.images > 1 else prompt for prompt, seed in rows]
        cell = cell or fitting_cell(len(rows), len(columns), max(images[0][0].size))
        return labelled_grid(images, labels, [label for label, _ in columns], cell=cell)

    def chunks(self, pipeline: Any, columns: list[Column], size: tuple[int, int]) -> PngInfo:
        """Return the record of the sheet, for Pillow's `save(pnginfo=...)`.

        Args:
            pipeline: the result of `prepare`.
            columns: the result of `columns`.
            size: size of each image.
        """
        from ...imaging.generation_record import png_chunks
        from .record import RunRecord

        # As in A1111, the text of a grid is that of its first image.
        record, text = RunRecord(self, pipeline).of_image(*self.rows()[0], size)
        return png_chunks({**record, "grid": self.facts(columns)}, text)

    def facts(self, columns: list[Column]) -> dict[str, Any]:
        """Return rows, columns and settings of the sheet as JSON values."""
        from ...utils.version import __version__

        settings = self.model_dump(
            mode="json", exclude={"output", "overwrite", "cell", "json_output", "columns_at_once", "prompt"}
        )
        return {
            "restune_diffusion": __version__,
            "rows": [{"prompt": prompt, "seed": seed} for prompt, seed in self.rows()],
            "columns": [{"label": label, "weights": weights or {}} for label, weights in columns],
            "settings": settings,
        }
