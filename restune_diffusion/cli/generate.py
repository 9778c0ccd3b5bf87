"""`restune generate`: generate images with a base and any mix of tuners."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .options.sampling import SamplingOptions


class GenerateOptions(SamplingOptions):
    """Generate images with a base and any mix of tuners.

    Example: restune generate --base ./stable-diffusion-v1-5 --tuner watercolor.safetensors:0.8 ink.safetensors
    --tuner-schedule "ink: 0.4-1: 1" --prompt "a fox" "a lighthouse" --output ./images
    """

    control_image: tuple[str, ...] = ()
    """Condition images for control tuners: FILE, or CONDITION=FILE if the tuners take several conditions."""
    control_from: tuple[str, ...] = ()
    """Source images to compute condition images from: FILE or CONDITION=FILE, for the conditions canny, palette, blur
    and mask."""
    control_scale: float = 1.0
    """Conditioning scale: factor on the residuals of the conditions."""
    output: Path = Path("images")
    """Output folder for the PNG files."""

    def run(self) -> None:
        """Generate the images and print their paths."""
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
