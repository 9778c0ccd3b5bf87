"""`restune grid`: contact sheet of prompts by tuners and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from pydantic import Field

from ..utils.errors import RestuneError
from .options.interruption import stoppable
from .options.outputs import free_path
from .options.sampling import SamplingOptions, generator

if TYPE_CHECKING:
    from PIL import Image

Column = tuple[str, dict[str, float] | None]
"""Label of a column, and weight of each tuner; None for the column of the base."""


class GridOptions(SamplingOptions):
    """Generate images with the base and with each tuner at several weights, as one labeled contact sheet.

    Each row has one prompt and seed; all columns of a row start from the same noise. Tuners with placeholder tokens or
    LoRA for text encoders share steps only with columns of the same text.

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
    output: Path | None = None
    """Output PNG file; if not given, grid.png, or the next free number, grid-2.png."""
    cell: int | None = Field(default=None, ge=32)
    """Side of the square that each image is fitted into, in pixels; chosen for a moderate sheet size by default."""
    json_output: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False
    """Also write the settings of the sheet to a JSON file of the same name."""

    def run(self) -> None:
        """Generate the sheet and print its path."""
        from .quiet import quiet_libraries

        output = self.output or free_path(Path("grid.png"))
        with stoppable(lambda: f"{output} is not written"):
            self._check(output)
            quiet_libraries()
            self._write(output)

    def _check(self, output: Path) -> None:
        if output.suffix.lower() != ".png":
            raise RestuneError(
                f"--output {output} is not a PNG file; use a .png file, for example --output {output.stem}.png."
            )
        if self.share_steps > self.steps:
            raise RestuneError(
                f"--share-steps {self.share_steps} is more than --steps {self.steps}; use at most {self.steps}."
            )
        inputs = [path for path, _ in self.files()]
        self.check_outputs(output, *([output.with_suffix(".json")] if self.json_output else []), inputs=inputs)
        self.check_inputs()

    def _write(self, output: Path) -> None:
        from tqdm import tqdm

        from ..imaging.contact_sheet import fitting_cell, labelled_grid
        from ..imaging.generation_record import png_chunks
        from ..utils.atomic_write import atomic_write
        from .options.record import RunRecord

        columns = self._columns()
        pipeline = self.load()
        # One progress bar for the sheet replaces one for each batch.
        pipeline.set_progress_bar_config(disable=True)
        arguments = self.arguments(pipeline)
        rows = [(prompt, seed) for prompt in self.prompt for seed in self.seeds]
        images = [self._row(pipeline, *row, columns, arguments) for row in tqdm(rows, unit="row")]
        labels = [f"{prompt} (seed {seed})" if self.images > 1 else prompt for prompt, seed in rows]
        size = images[0][0].size
        cell = self.cell or fitting_cell(len(rows), len(columns), max(size))
        sheet = labelled_grid(images, labels, [label for label, _ in columns], cell=cell)
        facts = self._facts(columns, rows)
        # As in A1111, the text of a grid is that of its first image.
        record, text = RunRecord(self, pipeline).of_image(*rows[0], size)
        with atomic_write(output) as file:
            sheet.save(file, format="PNG", pnginfo=png_chunks({**record, "grid": facts}, text))
        print(output)
        if self.json_output:
            path = output.with_suffix(".json")
            with atomic_write(path) as file:
                file.write(json.dumps(facts, indent=2).encode() + b"\n")
            print(path)

    def _columns(self) -> list[Column]:
        from .options.mix import distinct_labels, unique_names

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

    def _row(
        self, pipeline: Any, prompt: str, seed: int, columns: list[Column], arguments: dict[str, Any]
    ) -> list[Image.Image]:
        """Generate the images of a row; the columns of one batch have the same text."""
        from ..pipelines.prompt_encoding import text_tuner_names

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

    def _facts(self, columns: list[Column], rows: list[tuple[str, int]]) -> dict[str, Any]:
        from ..utils.version import __version__

        settings = self.model_dump(
            mode="json", exclude={"output", "overwrite", "cell", "json_output", "columns_at_once", "prompt"}
        )
        return {
            "restune_diffusion": __version__,
            "rows": [{"prompt": prompt, "seed": seed} for prompt, seed in rows],
            "columns": [{"label": label, "weights": weights or {}} for label, weights in columns],
            "settings": settings,
        }
