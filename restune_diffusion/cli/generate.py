"""`restune generate`: generate images with a base and any mix of tuners."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..pipelines.sampling.settings import generator
from .options.early_checks import check_writable
from .options.interruption import stoppable
from .options.sampling import SamplingOptions


class GenerateOptions(SamplingOptions):
    """Generate images with a base and any mix of tuners.

    A folder with images of an earlier run is numbered on. Each PNG file records how it was generated, as JSON and in
    A1111's format; `restune inspect IMAGE` shows it.

    Example: restune generate --base ./stable-diffusion-v1-5 --tuner watercolor.safetensors:0.8 ink.safetensors
    --tuner-schedule "ink: 0.4-1: 1" --prompt "a fox" "a lighthouse" --output ./images
    """

    output: Path = Path("images")
    """Output folder for the PNG files."""

    def run(self) -> None:
        """Generate the images and print their paths."""
        from .quiet import quiet_libraries

        written: list[Path] = []
        total = len(self.prompt) * self.images
        with stoppable(lambda: f"{len(written)} of {total} images are written to {self.output}"):
            check_writable(self.output)
            self.check_inputs()
            quiet_libraries()
            pipeline = self.load()
            arguments = self.arguments(pipeline)
            self.output.mkdir(parents=True, exist_ok=True)
            for path in self._images(pipeline, arguments):
                written.append(path)
                print(path, flush=True)

    def _images(self, pipeline: Any, arguments: dict[str, Any]) -> Iterator[Path]:
        from ..imaging.generation_record import png_chunks
        from ..pipelines.sampling.image_names import image_name, next_number
        from ..pipelines.sampling.record import RunRecord
        from ..utils.atomic_write import atomic_write

        record: RunRecord | None = None
        first = 0 if self.overwrite else next_number(self.output)
        for number, prompt in enumerate(self.prompt, first):
            for seed in self.seeds:
                image = pipeline(prompt, generator=generator(seed), **arguments).images[0]
                record = record or RunRecord(self, pipeline)
                path = self.output / image_name(number, seed)
                with atomic_write(path) as file:
                    image.save(file, format="PNG", pnginfo=png_chunks(*record.of_image(prompt, seed, image.size)))
                yield path
