"""`restune grid`: contact sheet of prompts by tuners and weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from pydantic import Field

from ..utils.errors import RestuneError
from .options.sampling import SamplingOptions

if TYPE_CHECKING:
    from PIL import Image

Column = tuple[str, dict[str, float] | None]
"""Label of a column, and weight of each tuner; None for the column of the base."""


class GridOptions(SamplingOptions):
    """Generate images with the base and with each tuner at several weights, as one labeled contact sheet.

    Each row has one prompt and seed; all columns of a row start from the same noise.

    Example: restune grid --base ./stable-diffusion-v1-5 --tuner watercolor.safetensors ink.safetensors
    --weights 0.5 1 --prompt "a fox" "a lighthouse" --share-steps 10 --output grid.png
    """

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
    output: Path = Path("grid.png")
    """Output PNG file."""
    cell: int | None = Field(default=None, ge=32)
    """Side of the square that each image is fitted into, in pixels; chosen for a moderate sheet size by default."""
    json_output: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False
    """Also write the settings of the sheet to a JSON file of the same name."""

    def run(self) -> None:
        """Generate the sheet and print its path."""
        from .quiet import quiet_libraries

        quiet_libraries()
        if self.output.suffix.lower() != ".png":
            raise RestuneError(
                f"--output {self.output} is not a PNG file; use a .png file, for example --output "
                f"{self.output.stem}.png."
            )
        if self.share_steps > self.steps:
            raise RestuneError(
                f"--share-steps {self.share_steps} is more than --steps {self.steps}; use at most {self.steps}."
            )
        from tqdm import tqdm

        from ..imaging.contact_sheet import fitting_cell, labelled_grid
        from ..utils.atomic_write import atomic_write

        columns = self._columns()
        pipeline = self.load()
        # One progress bar for the sheet replaces one for each batch.
        pipeline.set_progress_bar_config(disable=True)
        rows = [(prompt, seed) for prompt in self.prompt for seed in self.seeds]
        images = [list(self._row(pipeline, *row, columns)) for row in tqdm(rows, unit="row")]
        labels = [f"{prompt} (seed {seed})" if self.images > 1 else prompt for prompt, seed in rows]
        cell = self.cell or fitting_cell(len(rows), len(columns), max(images[0][0].size))
        sheet = labelled_grid(images, labels, [label for label, _ in columns], cell=cell)
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
