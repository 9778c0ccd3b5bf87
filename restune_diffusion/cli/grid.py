"""`restune grid`: a contact sheet of prompts by tuners by weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from pydantic import Field

from ..utils.errors import RestuneError
from .options.sampling import DrawOptions

if TYPE_CHECKING:
    from PIL import Image

Column = tuple[str, dict[str, float] | None]
"""Label, and weights by tuner; None for the base alone."""


class GridOptions(DrawOptions):
    """Draw prompts with the base and with each tuner at several weights, on one labelled sheet.

    Every row is one prompt and seed, drawn in all columns from the same noise.

    Example: restune grid --base ./stable-diffusion-v1-5 --tuner watercolor.safetensors ink.safetensors
    --weights 0.5 1 --prompt "a fox" "a lighthouse" --share-steps 10 --output grid.png
    """

    tuner: tuple[str, ...] = ()
    """Tuner files; one with a weight after a colon, `watercolor.safetensors:0.8`, gets one column at this weight."""
    weights_of_columns: Annotated[tuple[float, ...], tyro.conf.arg(name="weights")] = Field((1.0,), min_length=1)
    """Weights at which each tuner is drawn, one column each."""
    mix: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Add a column with all tuners at once, each at its weight after the colon, or 1."""
    share_steps: int = Field(default=0, ge=0)
    """Denoising steps that the columns of a row have in common: with a few, they are one composition, and cheaper."""
    columns_at_once: int = Field(default=4, gt=0)
    """Columns that are drawn in one batch; fewer need less memory."""
    output: Path = Path("grid.png")
    """The PNG file."""
    cell: int | None = Field(default=None, ge=32)
    """Side of the square that each picture is fitted into, in pixels; chosen for a moderate page by default."""
    json_output: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False
    """Write the settings of the sheet beside it as JSON."""

    def run(self) -> None:
        """Draw the sheet and print where it is."""
        from .quiet import quiet_libraries

        quiet_libraries()
        if self.output.suffix.lower() != ".png":
            raise RestuneError(f"The sheet is a PNG file; write for instance --output {self.output.stem}.png.")
        if self.share_steps > self.steps:
            raise RestuneError(f"--share-steps {self.share_steps} is more than the {self.steps} --steps.")
        from tqdm import tqdm

        from ..imaging.contact_sheet import fitting_cell, labelled_grid
        from ..utils.atomic_write import atomic_write

        columns = self._columns()
        pipeline = self.load()
        # One bar for the sheet says more than one for each batch.
        pipeline.set_progress_bar_config(disable=True)
        rows = [(prompt, seed) for prompt in self.prompt for seed in self.seeds]
        drawn = [list(self._row(pipeline, *row, columns)) for row in tqdm(rows, unit="row")]
        labels = [f"{prompt} (seed {seed})" if self.images > 1 else prompt for prompt, seed in rows]
        cell = self.cell or fitting_cell(len(rows), len(columns), max(drawn[0][0].size))
        sheet = labelled_grid(drawn, labels, [label for label, _ in columns], cell=cell)
        with atomic_write(self.output) as file:
            sheet.save(file, format="PNG")
        print(self.output)
        if self.json_output:
            path = self.output.with_suffix(".json")
            with atomic_write(path) as file:
                file.write(json.dumps(self._facts(columns, rows), indent=2).encode() + b"\n")
            print(path)

    def _columns(self) -> list[Column]:
        from .options.mix import split_weight, unique_names

        files = [split_weight(argument) for argument in self.tuner]
        names = unique_names([path for path, _ in files])
        columns: list[Column] = [("base", None)]
        for name, argument, (path, weight) in zip(names, self.tuner, files, strict=True):
            weights = self.weights_of_columns if path == argument else (weight,)
            columns += [(name if weights == (1.0,) else f"{name} {value:g}", {name: value}) for value in weights]
        if self.mix:
            columns.append(("mix", {name: weight for name, (_, weight) in zip(names, files, strict=True)}))
        return columns

    def _row(self, pipeline: Any, prompt: str, seed: int, columns: list[Column]) -> Iterator[Image.Image]:
        mixes = [weights for _, weights in columns]
        for first in range(0, len(mixes), self.columns_at_once):
            batch = mixes[first : first + self.columns_at_once]
            yield from pipeline.branches(prompt, batch, self.share_steps, **self.arguments(seed)).images

    def _facts(self, columns: list[Column], rows: list[tuple[str, int]]) -> dict[str, Any]:
        from ..utils.version import __version__

        settings = self.model_dump(mode="json", exclude={"output", "cell", "json_output", "columns_at_once", "prompt"})
        return {
            "restune_diffusion": __version__,
            "rows": [{"prompt": prompt, "seed": seed} for prompt, seed in rows],
            "columns": [{"label": label, "weights": weights or {}} for label, weights in columns],
            "settings": settings,
        }
