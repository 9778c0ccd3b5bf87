"""`restune generate`: draw images with a base and any mix of tuners."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .options.sampling import DrawOptions


class GenerateOptions(DrawOptions):
    """Draw images with a base and any mix of tuners.

    Example: restune generate --base ./stable-diffusion-v1-5 --tuner watercolor.safetensors:0.8 ink.safetensors
    --tuner-schedule "ink: 0.4-1: 1" --prompt "a fox" "a lighthouse" --output ./images
    """

    control_image: tuple[str, ...] = ()
    """Condition images that steer control tuners: FILE, or CONDITION=FILE where they take several conditions."""
    control_from: tuple[str, ...] = ()
    """Pictures to make condition images from, written likewise, for conditions called canny, palette, blur or mask."""
    control_scale: float = 1.0
    """Factor on what the conditions add."""
    output: Path = Path("images")
    """Folder for the PNG files."""

    def run(self) -> None:
        """Draw the images and print where they are."""
        from .quiet import quiet_libraries

        quiet_libraries()
        pipeline = self.load()
        self.output.mkdir(parents=True, exist_ok=True)
        for path, image in self._images(pipeline):
            image.save(path)
            print(path)

    def _images(self, pipeline: Any) -> Any:
        from .options.control_images import read_control_images

        control_images = read_control_images(
            pipeline, self.control_image, self.control_from, (self.width, self.height)
        )
        for number, prompt in enumerate(self.prompt):
            for seed in self.seeds:
                result = pipeline(
                    prompt,
                    tuner_image=control_images,
                    tuner_conditioning_scale=self.control_scale,
                    **self.arguments(seed),
                )
                yield self.output / f"{number:02d}-seed{seed}.png", result.images[0]
