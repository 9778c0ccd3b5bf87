"""`restune generate`: draw images with a base and any mix of tuners."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class GenerateOptions(BaseModel):
    """Draw images with a base and any mix of tuners.

    Example: restune generate --base ./stable-diffusion-v1-5 --tuner watercolor.safetensors:0.8
    --prompt "a fox" "a lighthouse" --output ./images
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    base: str
    """Stable Diffusion checkpoint in diffusers' layout: a directory, or the id of a hub repository."""
    prompt: tuple[str, ...] = Field(min_length=1)
    """One or more prompts."""
    tuner: tuple[str, ...] = ()
    """Tuner files, each with its weight after a colon where it is not 1."""
    control_image: tuple[str, ...] = ()
    """Condition images that steer control tuners: FILE, or CONDITION=FILE where they take several conditions."""
    control_from: tuple[str, ...] = ()
    """Pictures to make condition images from, written likewise, for conditions called canny, palette, blur or mask."""
    control_scale: float = 1.0
    """Factor on what the conditions add."""
    output: Path = Path("images")
    """Folder for the PNG files."""
    negative_prompt: str | None = None
    """What the images should not show."""
    seed: int = 0
    """Seed of the first image of every prompt; further ones count on from there."""
    images: int = Field(default=1, gt=0)
    """Images of each prompt."""
    steps: int = Field(default=50, gt=0)
    """Denoising steps."""
    guidance: float = Field(default=7.5, ge=0)
    """Classifier-free guidance."""
    width: int | None = Field(default=None, gt=0)
    """Width in pixels; the base's own where not given."""
    height: int | None = Field(default=None, gt=0)
    """Height in pixels; the base's own where not given."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; `auto` takes a GPU if there is one."""
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Precision; `auto` is fp16 on a GPU and fp32 on the CPU."""

    def run(self) -> None:
        """Draw the images and print where they are."""
        from .quiet import quiet_libraries

        quiet_libraries()
        tuners = [split_weight(tuner) for tuner in self.tuner]
        pipeline = self._load(tuners)
        self.output.mkdir(parents=True, exist_ok=True)
        for path, image in self._images(pipeline):
            image.save(path)
            print(path)

    def _load(self, tuners: list[tuple[str, float]]) -> Any:
        from .placement import load_placed

        pipeline = load_placed(self.base, self.device, self.dtype)
        names = unique_names([path for path, _ in tuners])
        for name, (path, weight) in zip(names, tuners, strict=True):
            pipeline.load_tuner_weights(path, tuner_name=name, weight=weight)
        return pipeline

    def _images(self, pipeline: Any) -> Any:
        import torch

        from .control import read_control_images

        size = (self.width, self.height)
        steering = read_control_images(pipeline, self.control_image, self.control_from, size)
        for number, prompt in enumerate(self.prompt):
            for seed in range(self.seed, self.seed + self.images):
                result = pipeline(
                    prompt,
                    tuner_image=steering,
                    tuner_conditioning_scale=self.control_scale,
                    negative_prompt=self.negative_prompt,
                    num_inference_steps=self.steps,
                    guidance_scale=self.guidance,
                    width=self.width,
                    height=self.height,
                    # On the CPU, so that a seed means the same image on every machine.
                    generator=torch.Generator("cpu").manual_seed(seed),
                )
                yield self.output / f"{number:02d}-seed{seed}.png", result.images[0]


def split_weight(argument: str) -> tuple[str, float]:
    """Split `FILE:WEIGHT`; the weight may be left out, and the file may contain colons itself."""
    path, colon, weight = argument.rpartition(":")
    if not colon or not path:
        return argument, 1.0
    try:
        return path, float(weight)
    except ValueError:
        # `C:\\tuners\\a.safetensors`, or a misspelled weight, which is then told as a file that does not exist
        return argument, 1.0


def unique_names(paths: list[str]) -> list[str]:
    """Name tuners after their files, with a number behind those that share a name."""
    names: list[str] = []
    for path in paths:
        stem = name = Path(path).stem
        count = 1
        while name in names:
            count += 1
            name = f"{stem}-{count}"
        names.append(name)
    return names
