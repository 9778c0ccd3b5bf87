"""`restune grid`: contact sheet of prompts by tuners and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field

from ..pipelines.sampling.grid import GridSettings
from ..pipelines.sampling.image_names import free_path
from ..utils.errors import RestuneError
from .options.interruption import stoppable
from .options.sampling import SamplingOptions


class GridOptions(SamplingOptions, GridSettings):
    """Generate images with the base and with each tuner at several weights, as one labeled contact sheet.

    Each row has one prompt and seed; all columns of a row start from the same noise. Tuners with placeholder tokens or
    LoRA for text encoders share steps only with columns of the same text.

    Example: restune grid --base ./stable-diffusion-v1-5 --tuner watercolor.safetensors ink.safetensors
    --weights 0.5 1 --prompt "a fox" "a lighthouse" --share-steps 10 --output grid.png
    """

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

        from ..utils.atomic_write import atomic_write

        columns = self.columns()
        pipeline = self.load()
        # One progress bar for the sheet replaces one for each batch.
        pipeline.set_progress_bar_config(disable=True)
        arguments = self.arguments(pipeline)
        images = [self.row(pipeline, *row, columns, arguments) for row in tqdm(self.rows(), unit="row")]
        sheet = self.sheet(images, columns, self.cell)
        chunks = self.chunks(pipeline, columns, images[0][0].size)
        with atomic_write(output) as file:
            sheet.save(file, format="PNG", pnginfo=chunks)
        print(output)
        if self.json_output:
            path = output.with_suffix(".json")
            with atomic_write(path) as file:
                file.write(json.dumps(self.facts(columns), indent=2).encode() + b"\n")
            print(path)
